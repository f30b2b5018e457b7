/*
 * The storage manager of the helper: one page, in memory.
 *
 * The server's table of storage managers is constant (.data.rel.ro in a
 * position independent executable, .rodata in another), but it is the only
 * place in the executable's data where the addresses of mdinit, 0 and mdopen
 * follow each other.  Every slot is compared with the function it must hold
 * before any is replaced: a build that differs stops at the start.
 */
#include "redo.h"

#include <dlfcn.h>
#include <link.h>
#include <sys/mman.h>
#include <unistd.h>

#include "storage/smgr.h"

#if PG_VERSION_NUM >= 160000
typedef void PageBuffer;
#else
typedef char PageBuffer;
#endif

TargetPage	target;
char		up_to_date_page[BLCKSZ];

static inline bool
is_target(SMgrRelation relation, ForkNumber fork, BlockNumber blk)
{
	return blk == target.blk && fork == target.fork &&
		RelFileLocatorEquals(relation->smgr_rlocator.locator, target.rlocator);
}

static void
one_open(SMgrRelation relation)
{
	(void) relation;
}

static void
one_close(SMgrRelation relation, ForkNumber fork)
{
	(void) relation;
	(void) fork;
}

static void
one_create(SMgrRelation relation, ForkNumber fork, bool is_redo)
{
	(void) relation;
	(void) fork;
	(void) is_redo;
}

static bool
one_exists(SMgrRelation relation, ForkNumber fork)
{
	(void) relation;
	(void) fork;
	return true;
}

/* Nothing is ever extended, because nothing ever ends. */
static BlockNumber
one_nblocks(SMgrRelation relation, ForkNumber fork)
{
	(void) relation;
	(void) fork;
	return MaxBlockNumber;
}

/* mdextend, and mdwrite before 17 */
static void
one_write(SMgrRelation relation, ForkNumber fork, BlockNumber blk, const PageBuffer *buffer, bool skip_fsync)
{
	(void) skip_fsync;
	if (is_target(relation, fork, blk))
		memcpy(target.page, buffer, BLCKSZ);
}

static void
one_writeback(SMgrRelation relation, ForkNumber fork, BlockNumber blk, BlockNumber nblocks)
{
	(void) relation;
	(void) fork;
	(void) blk;
	(void) nblocks;
}

#if PG_VERSION_NUM >= 170000
static bool
one_prefetch(SMgrRelation relation, ForkNumber fork, BlockNumber blk, int nblocks)
{
	(void) relation;
	(void) fork;
	(void) blk;
	(void) nblocks;
	return true;
}

static void
one_readv(SMgrRelation relation, ForkNumber fork, BlockNumber blk, void **buffers, BlockNumber nblocks)
{
	for (BlockNumber i = 0; i < nblocks; i++)
		memcpy(buffers[i], is_target(relation, fork, blk + i) ? target.page : up_to_date_page, BLCKSZ);
}

static void
one_writev(SMgrRelation relation, ForkNumber fork, BlockNumber blk, const void **buffers, BlockNumber nblocks, bool skip_fsync)
{
	for (BlockNumber i = 0; i < nblocks; i++)
		one_write(relation, fork, blk + i, buffers[i], skip_fsync);
}

static void
one_registersync(SMgrRelation relation, ForkNumber fork)
{
	(void) relation;
	(void) fork;
}
#else
static bool
one_prefetch(SMgrRelation relation, ForkNumber fork, BlockNumber blk)
{
	(void) relation;
	(void) fork;
	(void) blk;
	return true;
}

static void
one_read(SMgrRelation relation, ForkNumber fork, BlockNumber blk, PageBuffer *buffer)
{
	memcpy(buffer, is_target(relation, fork, blk) ? target.page : up_to_date_page, BLCKSZ);
}
#endif

#if PG_VERSION_NUM >= 180000
static uint32
one_maxcombine(SMgrRelation relation, ForkNumber fork, BlockNumber blk)
{
	(void) relation;
	(void) fork;
	(void) blk;
	return 1;
}
#endif

static void
not_expected(void)
{
	elog(ERROR, "storage call that page redo must not make");
}

/* The slots after {mdinit, NULL}, in the order of the server's table. */
typedef struct Slot
{
	const char *name;
	void	   *replacement;
} Slot;

static const Slot slots[] = {
	{"mdopen", one_open},
	{"mdclose", one_close},
	{"mdcreate", one_create},
	{"mdexists", one_exists},
	{"mdunlink", not_expected},
	{"mdextend", one_write},
#if PG_VERSION_NUM >= 160000
	{"mdzeroextend", not_expected},
#endif
	{"mdprefetch", one_prefetch},
#if PG_VERSION_NUM >= 180000
	{"mdmaxcombine", one_maxcombine},
#endif
#if PG_VERSION_NUM >= 170000
	{"mdreadv", one_readv},
#if PG_VERSION_NUM >= 180000
	{"mdstartreadv", not_expected},
#endif
	{"mdwritev", one_writev},
#else
	{"mdread", one_read},
	{"mdwrite", one_write},
#endif
	{"mdwriteback", one_writeback},
	{"mdnblocks", one_nblocks},
	{"mdtruncate", not_expected},
	{"mdimmedsync", not_expected},
#if PG_VERSION_NUM >= 170000
	{"mdregistersync", one_registersync},
#endif
#if PG_VERSION_NUM >= 180000
	{"mdfd", not_expected},
#endif
};

#define TABLE_SLOTS (lengthof(slots) + 2)

static void *
server_symbol(const char *name)
{
	void	   *address = dlsym(RTLD_DEFAULT, name);

	if (address == NULL)
		die("neon_redo: this server does not export %s", name);
	return address;
}

typedef struct Search
{
	void	   *init;
	void	   *open;
	void	  **found;
} Search;

static void
search_segment(Search *search, uintptr_t begin, uintptr_t end)
{
	for (uintptr_t at = TYPEALIGN(sizeof(void *), begin); at + TABLE_SLOTS * sizeof(void *) <= end; at += sizeof(void *))
	{
		void	  **table = (void **) at;

		if (table[0] != search->init || table[1] != NULL || table[2] != search->open)
			continue;
		if (search->found != NULL)
			die("neon_redo: more than one storage manager table in this server");
		search->found = table;
	}
}

/* Called for the first loaded object, which is the executable. */
static int
search_executable(struct dl_phdr_info *info, size_t size, void *argument)
{
	(void) size;
	for (int i = 0; i < info->dlpi_phnum; i++)
	{
		const ElfW(Phdr) * segment = &info->dlpi_phdr[i];
		uintptr_t	begin = info->dlpi_addr + segment->p_vaddr;

		if (segment->p_type == PT_LOAD && (segment->p_flags & (PF_R | PF_X)) == PF_R)
			search_segment(argument, begin, begin + segment->p_filesz);
	}
	return 1;
}

static void **
find_table(void)
{
	Search		search = {server_symbol("mdinit"), server_symbol("mdopen"), NULL};

	dl_iterate_phdr(search_executable, &search);
	if (search.found == NULL)
		die("neon_redo: no storage manager table in this server");
	for (size_t i = 0; i < lengthof(slots); i++)
		if (search.found[i + 2] != server_symbol(slots[i].name))
			die("neon_redo: slot %zu of the storage manager table is not %s: built for another server", i, slots[i].name);
	return search.found;
}

void
install_storage_manager(void)
{
	void	  **table = find_table();
	uintptr_t	page_size = (uintptr_t) sysconf(_SC_PAGESIZE);
	uintptr_t	begin = (uintptr_t) table & ~(page_size - 1);
	uintptr_t	end = TYPEALIGN(page_size, (uintptr_t) (table + TABLE_SLOTS));

	if (mprotect((void *) begin, end - begin, PROT_READ | PROT_WRITE) != 0)
		die("neon_redo: mprotect: %m");
	table[0] = NULL;			/* no mdinit */
	for (size_t i = 0; i < lengthof(slots); i++)
		table[i + 2] = slots[i].replacement;
	if (mprotect((void *) begin, end - begin, PROT_READ) != 0)
		die("neon_redo: mprotect: %m");
	PageInit(up_to_date_page, BLCKSZ, 0);
	PageSetLSN(up_to_date_page, PG_UINT64_MAX);
}
