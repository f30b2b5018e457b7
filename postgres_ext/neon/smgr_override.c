/*
 * smgr_override.c
 *		Put the wrappers into the server's own table of storage manager functions.
 *
 * Two installers behind one table of overrides: a build that exports a storage
 * manager hook would get them through the hook; a stock build has none, and its
 * private "static const f_smgr smgrsw[]" is found in the executable's RELRO
 * segment by the exact run of addresses it must consist of.  Anything that is
 * not exactly as verified is FATAL.
 */
#include "neon.h"

#include <dlfcn.h>
#include <link.h>
#include <sys/mman.h>
#include <unistd.h>

#include "storage/md.h"
#include "utils/elog.h"

/* The order of f_smgr's members; NULL must be NULL. */
static void *const smgr_table[] = {
	(void *) mdinit,
	NULL,						/* smgr_shutdown */
	(void *) mdopen,
	(void *) mdclose,
	(void *) mdcreate,
	(void *) mdexists,
	(void *) mdunlink,
	(void *) mdextend,
#if PG_VERSION_NUM >= 160000
	(void *) mdzeroextend,
#endif
	(void *) mdprefetch,
#if NEON_VECTORED
	(void *) mdreadv,
	(void *) mdwritev,
#else
	(void *) mdread,
	(void *) mdwrite,
#endif
	(void *) mdwriteback,
	(void *) mdnblocks,
	(void *) mdtruncate,
	(void *) mdimmedsync,
#if PG_VERSION_NUM >= 170000
	(void *) mdregistersync,
#endif
};

typedef struct TableSearch
{
	void	  **table;
	int			matches;
	int			segments;
} TableSearch;

static int
search_program(struct dl_phdr_info *info, size_t size, void *arg)
{
	TableSearch *search = arg;

	for (int i = 0; i < info->dlpi_phnum; i++)
	{
		const		ElfW(Phdr) *segment = &info->dlpi_phdr[i];
		uintptr_t	start,
					end;

		if (segment->p_type != PT_GNU_RELRO)
			continue;
		search->segments++;
		start = TYPEALIGN(sizeof(void *), info->dlpi_addr + segment->p_vaddr);
		end = info->dlpi_addr + segment->p_vaddr + segment->p_memsz;
		for (uintptr_t at = start; at + sizeof(smgr_table) <= end; at += sizeof(void *))
			if (memcmp((void *) at, smgr_table, sizeof(smgr_table)) == 0)
			{
				search->table = (void **) at;
				search->matches++;
			}
	}
	return 1;					/* the first object is the program itself: stop */
}

/*
 * Did the compiler turn a call through the table into a direct one?  Look for
 * direct calls and jumps from smgr.c's code to the function of md.c.
 */
static bool
called_directly(void *function)
{
	uintptr_t	low = (uintptr_t) smgrinit;
	uintptr_t	high = (uintptr_t) AtEOXact_SMgr;

	if (high <= low || high - low > 65536)
		ereport(FATAL,
				(errcode(ERRCODE_FEATURE_NOT_SUPPORTED),
				 errmsg("the functions of smgr.c are not in source order in this build of the server"),
				 errdetail("Build: %s.", PG_VERSION_STR)));
#if defined(__x86_64__)
	for (uintptr_t at = low; at + 5 <= high; at++)
	{
		uint8		opcode = *(uint8 *) at;
		int32		relative;

		if (opcode != 0xE8 && opcode != 0xE9)	/* CALL, JMP rel32 */
			continue;
		memcpy(&relative, (void *) (at + 1), sizeof(relative));
		if (at + 5 + (intptr_t) relative == (uintptr_t) function)
			return true;
	}
#elif defined(__aarch64__)
	for (uintptr_t at = low; at < high; at += 4)
	{
		uint32		instruction = *(uint32 *) at;

		if ((instruction & 0x7C000000) != 0x14000000)	/* B, BL imm26 */
			continue;
		if (at + ((intptr_t) ((int32) (instruction << 6) >> 4)) == (uintptr_t) function)
			return true;
	}
#else
#error "the check for direct calls knows x86-64 and aarch64 only"
#endif
	return false;
}

static void
replace(void **table, const NeonOverride *override)
{
	int			hits = 0;

	if (called_directly(override->original))
		ereport(FATAL,
				(errcode(ERRCODE_FEATURE_NOT_SUPPORTED),
				 errmsg("smgr.c calls %s() directly in this build of the server", override->name),
				 errdetail("The storage manager table would be bypassed. Build: %s.", PG_VERSION_STR)));
	for (size_t i = 0; i < lengthof(smgr_table); i++)
		if (table[i] == override->original)
		{
			table[i] = override->wrapper;
			hits++;
		}
	if (hits != 1)
		ereport(FATAL,
				(errcode(ERRCODE_FEATURE_NOT_SUPPORTED),
				 errmsg("%s() is %d times in the storage manager table, expected once", override->name, hits)));
}

static void
install_in_table(void)
{
	TableSearch search = {0};
	uintptr_t	page_size = (uintptr_t) sysconf(_SC_PAGESIZE);
	uintptr_t	low,
				high;

	dl_iterate_phdr(search_program, &search);
	if (search.matches != 1)
		ereport(FATAL,
				(errcode(ERRCODE_FEATURE_NOT_SUPPORTED),
				 errmsg("the storage manager table was found %d times, expected once", search.matches),
				 errdetail("Searched %d read-only segments of the server. Build: %s.", search.segments, PG_VERSION_STR),
				 errhint("\"neon\" must be the first of shared_preload_libraries.")));
	low = TYPEALIGN_DOWN(page_size, (uintptr_t) search.table);
	high = TYPEALIGN(page_size, (uintptr_t) search.table + sizeof(smgr_table));
	if (mprotect((void *) low, high - low, PROT_READ | PROT_WRITE) != 0)
		ereport(FATAL, (errmsg("could not make the storage manager table writable: %m")));
	for (int i = 0; i < neon_overrides_count; i++)
	{
#ifdef NEON_TEST_SKIP_OVERRIDE
		/* planted fault: one function keeps bypassing the library, which the self-test must find */
		if (strcmp(neon_overrides[i].name, NEON_TEST_SKIP_OVERRIDE) == 0)
			continue;
#endif
		replace(search.table, &neon_overrides[i]);
	}
	if (mprotect((void *) low, high - low, PROT_READ) != 0)
		ereport(FATAL, (errmsg("could not make the storage manager table read-only again: %m")));
}

void
neon_install_overrides(void)
{
	/* a build with a hook has another table; its installer has not been written, so it must not fall through */
	if (dlsym(RTLD_DEFAULT, "smgr_hook") != NULL)
		ereport(FATAL,
				(errcode(ERRCODE_FEATURE_NOT_SUPPORTED),
				 errmsg("this build of the server has a storage manager hook, which is not supported yet"),
				 errhint("Use the distribution's unmodified server package.")));
	install_in_table();
}
