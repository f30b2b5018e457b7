/*
 * block_map.c
 *		The map of all relation forks of the base image, shared by all processes.
 *
 * One file, mapped once in the postmaster and inherited by fork:
 *		header (NEON_MAP_HEADER_SIZE) | table of NeonMapEntry | presence bitmaps
 * The table is open-addressed, written once by whoever made the data directory,
 * and never grows: relations made later are local and have no entry.
 */
#include "neon.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "catalog/pg_control.h"
#include "common/controldata_utils.h"
#include "common/file_perm.h"
#include "miscadmin.h"
#include "port/pg_crc32c.h"
#include "storage/fd.h"

NeonMapHeader *neon_map = NULL;
NeonMapEntry *neon_entries = NULL;

StaticAssertDecl(sizeof(NeonMapEntry) == 32, "the map's entries are written by other programs");
StaticAssertDecl(sizeof(NeonMapHeader) <= NEON_MAP_HEADER_SIZE, "the map's header must fit");

static void
refuse(const char *detail, const char *hint)
{
	ereport(FATAL,
			(errcode(ERRCODE_DATA_CORRUPTED),
			 errmsg("\"%s\" does not fit this data directory", NEON_MAP_FILE),
			 errdetail_internal("%s", detail),
			 errhint("%s", hint ? hint : "A compute's directory is made anew at each start; start it with compute_ctl.")));
}

static bool
same_id(const uint8 *raw, const char *text)
{
	for (int i = 0; i < 16; i++)
	{
		char		hex[3];

		snprintf(hex, sizeof(hex), "%02x", raw[i]);
		if (pg_strncasecmp(text + 2 * i, hex, 2) != 0)
			return false;
	}
	return text[32] == '\0';
}

static void
check_id(const char *setting, const char *configured, const uint8 *raw)
{
	if (strlen(configured) != 32 || !same_id(raw, configured))
		refuse(psprintf("Setting \"%s\" is \"%s\", but the directory was made for another one.", setting, configured),
			   NULL);
}

static void
check_header(const NeonMapHeader *header, uint64 file_size)
{
	pg_crc32c	crc;
	bool		control_ok;
	ControlFileData *control;

	if (header->magic != NEON_MAP_MAGIC)
		refuse("It has a wrong magic number.", NULL);
	if (header->version != NEON_MAP_VERSION)
		refuse(psprintf("It has version %u, this library reads version %d.", header->version, NEON_MAP_VERSION),
			   "Install compute_ctl and the library from the same release.");
	INIT_CRC32C(crc);
	COMP_CRC32C(crc, &header->system_identifier,
				offsetof(NeonMapHeader, fixed_end) - offsetof(NeonMapHeader, system_identifier));
	FIN_CRC32C(crc);
	if (!EQ_CRC32C(crc, header->crc))
		refuse("Its header fails its checksum.", NULL);
	if (header->total_size != file_size ||
		header->nhome == 0 || (header->nhome & (header->nhome - 1)) != 0 || header->nhome > header->nslots ||
		header->nslots > (file_size - NEON_MAP_HEADER_SIZE) / sizeof(NeonMapEntry))
		refuse("Its size does not agree with its header.", NULL);

	control = get_controlfile(DataDir, &control_ok);
	if (!control_ok)
		refuse("\"global/pg_control\" fails its checksum.", NULL);
	if (control->system_identifier != header->system_identifier)
		refuse(psprintf("It is for system identifier " UINT64_FORMAT ", \"global/pg_control\" says " UINT64_FORMAT ".",
						header->system_identifier, control->system_identifier), NULL);
	if (control->checkPoint < header->base_lsn)
		refuse(psprintf("Its base LSN %X/%X is after the last checkpoint %X/%X.",
						LSN_FORMAT_ARGS(header->base_lsn), LSN_FORMAT_ARGS(control->checkPoint)), NULL);
	pfree(control);
	check_id("neon.tenant_id", neon_tenant_id, header->tenant_id);
	check_id("neon.timeline_id", neon_timeline_id, header->timeline_id);
}

/* Map the file and check that it belongs to this directory, or FATAL. */
void
neon_map_open(void)
{
	int			fd = open(NEON_MAP_FILE, O_RDWR | O_CLOEXEC);
	struct stat status;

	if (fd < 0)
		ereport(FATAL,
				(errcode_for_file_access(),
				 errmsg("could not open \"%s\": %m", NEON_MAP_FILE),
				 errhint("Library \"neon\" runs only on a data directory that compute_ctl has made.")));
	if (fstat(fd, &status) < 0)
		ereport(FATAL, (errcode_for_file_access(), errmsg("could not stat \"%s\": %m", NEON_MAP_FILE)));
	if (status.st_size < NEON_MAP_HEADER_SIZE + (off_t) sizeof(NeonMapEntry))
		refuse("It is too short.", NULL);
	neon_map = mmap(NULL, status.st_size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (neon_map == MAP_FAILED)
		ereport(FATAL, (errcode_for_file_access(), errmsg("could not map \"%s\": %m", NEON_MAP_FILE)));
	close(fd);
	check_header(neon_map, status.st_size);
	neon_entries = (NeonMapEntry *) ((char *) neon_map + NEON_MAP_HEADER_SIZE);
	if (neon_entries[neon_map->nslots - 1].state != NEON_ENTRY_EMPTY)
		refuse("Its table has no end.", NULL);
	for (uint64 i = 0; i < neon_map->nslots; i++)
	{
		const NeonMapEntry *entry = &neon_entries[i];

		if (entry->state > NEON_ENTRY_NO_FILE ||
			(entry->state != NEON_ENTRY_EMPTY &&
			 (entry->bitmap_offset < NEON_MAP_HEADER_SIZE + neon_map->nslots * sizeof(NeonMapEntry) ||
			  entry->bitmap_offset > neon_map->total_size ||
			  ((uint64) entry->base_nblocks + 7) / 8 > neon_map->total_size - entry->bitmap_offset)))
			refuse(psprintf("Entry " UINT64_FORMAT " of its table makes no sense.", i), NULL);
	}
}

void
neon_count(NeonCounter counter, uint64 n)
{
	pg_atomic_fetch_add_u64(&neon_map->counters[counter], n);
}

/* Make one segment file; the caller gets errno. */
static bool
make_segment(const char *path, uint64 nblocks)
{
	int			fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, pg_file_create_mode);
	bool		ok;
	int			save_errno;

	if (fd < 0)
		return false;
	ok = nblocks == 0 || ftruncate(fd, (off_t) nblocks * BLCKSZ) == 0;
	save_errno = errno;
	close(fd);
	errno = save_errno;
	return ok;
}

/*
 * Make the sparse files of a fork that exists in the base image, if that has not
 * been done.  Everything that may open the fork comes here first.  entry may be
 * NULL.  With missing_ok, false is returned when the directory is gone (the
 * database was dropped); any other failure is an ERROR.
 */
bool
neon_entry_ensure_files(NeonMapEntry *entry, bool missing_ok)
{
	char	   *path;
	LWLock	   *lock;

	if (entry == NULL || likely(__atomic_load_n(&entry->state, __ATOMIC_ACQUIRE) != NEON_ENTRY_NO_FILE))
		return true;
	path = GetRelationPath(entry->db, entry->spc, entry->rel, NEON_NO_BACKEND, (ForkNumber) entry->fork);
	lock = neon_entry_lock(entry, 0);
	LWLockAcquire(lock, LW_EXCLUSIVE);
	if (entry->state == NEON_ENTRY_NO_FILE)
	{
		uint64		left = entry->base_nblocks;

		for (int segment = 0; segment == 0 || left > 0; segment++)
		{
			uint64		nblocks = Min(left, RELSEG_SIZE);
			char		name[MAXPGPATH];

			if (segment == 0)
				strlcpy(name, path, sizeof(name));
			else
				snprintf(name, sizeof(name), "%s.%d", path, segment);
			if (!make_segment(name, nblocks))
			{
				if (errno == ENOENT && missing_ok)
				{
					LWLockRelease(lock);
					pfree(path);
					return false;
				}
				ereport(ERROR, (errcode_for_file_access(), errmsg("could not create file \"%s\": %m", name)));
			}
			left -= nblocks;
		}
		__atomic_store_n(&entry->state, NEON_ENTRY_FILE, __ATOMIC_RELEASE);
	}
	LWLockRelease(lock);
	pfree(path);
	return true;
}

/*
 * The relation is dropped: nothing of it is in the base image any more, and no
 * files are to be made for it.  entry may be NULL.
 */
void
neon_entry_forget(NeonMapEntry *entry)
{
	LWLock	   *lock;

	if (entry == NULL)
		return;
	lock = neon_entry_lock(entry, 0);
	LWLockAcquire(lock, LW_EXCLUSIVE);
	neon_entry_limit(entry, 0);
	__atomic_store_n(&entry->state, NEON_ENTRY_FILE, __ATOMIC_RELEASE);
	LWLockRelease(lock);
}
