/*
 * neon.c
 *		Load the library: settings, the guard, the block map, the storage manager.
 *
 * Everything that can be wrong with the build or the data directory is found
 * here, in the postmaster, before any process is forked and before anything is
 * written: each is FATAL with a message that names it.
 */
#include "neon.h"

#include "fmgr.h"
#include "miscadmin.h"
#include "storage/ipc.h"
#include "storage/shmem.h"
#include "utils/builtins.h"
#include "utils/fmgrprotos.h"

PG_MODULE_MAGIC;

extern PGDLLEXPORT void _PG_init(void);

NeonShared *neon_shared = NULL;
LWLockPadded *neon_locks = NULL;

static shmem_request_hook_type previous_shmem_request = NULL;
static shmem_startup_hook_type previous_shmem_startup = NULL;

static void
neon_shmem_request(void)
{
	if (previous_shmem_request)
		previous_shmem_request();
	RequestAddinShmemSpace(MAXALIGN(sizeof(NeonShared)));
	RequestNamedLWLockTranche("neon", NEON_LOCKS);
}

static void
neon_shmem_startup(void)
{
	bool		found;

	if (previous_shmem_startup)
		previous_shmem_startup();
	neon_locks = GetNamedLWLockTranche("neon");
	LWLockAcquire(AddinShmemInitLock, LW_EXCLUSIVE);
	neon_shared = ShmemInitStruct("neon", sizeof(NeonShared), &found);
	if (!found)
	{
		memset(neon_shared, 0, sizeof(NeonShared));
		pg_atomic_init_u32(&neon_shared->selftest_passed, 0);
		pg_atomic_init_u64(&neon_shared->connstring_begun, 0);
		pg_atomic_init_u64(&neon_shared->connstring_done, 0);
		neon_publish_connstring(neon_pageserver_connstring);
	}
	LWLockRelease(AddinShmemInitLock);
}

/*
 * Make the pageserver's address visible to all processes.  A backend that waits
 * for a page does not read the configuration, so the postmaster, which does,
 * tells it through shared memory.
 */
void
neon_publish_connstring(const char *connstring)
{
	if (neon_shared == NULL || (IsUnderPostmaster && MyProcPid != PostmasterPid))
		return;
	pg_atomic_fetch_add_u64(&neon_shared->connstring_begun, 1);
	pg_write_barrier();
	strlcpy(neon_shared->connstring, connstring ? connstring : "", NEON_CONNSTRING_SIZE);
	pg_write_barrier();
	pg_atomic_fetch_add_u64(&neon_shared->connstring_done, 1);
}

uint64
neon_connstring_generation(void)
{
	return pg_atomic_read_u64(&neon_shared->connstring_done);
}

/* Copy the address (NEON_CONNSTRING_SIZE bytes) and return its generation. */
uint64
neon_copy_connstring(char *copy)
{
	for (;;)
	{
		uint64		done = pg_atomic_read_u64(&neon_shared->connstring_done);

		pg_read_barrier();
		memcpy(copy, neon_shared->connstring, NEON_CONNSTRING_SIZE);
		pg_read_barrier();
		if (pg_atomic_read_u64(&neon_shared->connstring_begun) == done)
			return done;
		pg_usleep(10);			/* the postmaster is in the middle of a copy of 4 kB */
	}
}

/*
 * Signatures inside the server may change with any minor release (mdtruncate
 * did), so the library works only with the very build it was compiled for.
 */
static void
check_build(void)
{
	char	   *running = TextDatumGetCString(DirectFunctionCall1(pgsql_version, (Datum) 0));

	if (strcmp(running, PG_VERSION_STR) != 0)
		ereport(FATAL,
				(errcode(ERRCODE_FEATURE_NOT_SUPPORTED),
				 errmsg("library \"neon\" was built for another build of the server"),
				 errdetail("Running: %s. Built for: %s.", running, PG_VERSION_STR),
				 errhint("Compile the library against the installed server package.")));
	pfree(running);
}

void
_PG_init(void)
{
	if (!process_shared_preload_libraries_in_progress)
		ereport(ERROR,
				(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
				 errmsg("library \"neon\" must be loaded by shared_preload_libraries")));
	check_build();
	neon_define_settings();
	neon_guard_check();
	neon_map_open();
	neon_install_overrides();
	previous_shmem_request = shmem_request_hook;
	shmem_request_hook = neon_shmem_request;
	previous_shmem_startup = shmem_startup_hook;
	shmem_startup_hook = neon_shmem_startup;
	neon_install_utility_hook();
	neon_register_worker();
}
