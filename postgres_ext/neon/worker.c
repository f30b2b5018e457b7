/*
 * worker.c
 *		One background worker: first the self-test, then files for all relations.
 *
 * The checks at load time read the server's machine code; the self-test proves
 * the result: it uses a scratch relation through smgr* and looks whether each
 * wrapper was called.  If one was not, the server is stopped at once.
 *
 * Afterwards, and late enough not to slow the start, the worker makes the sparse
 * files of relations that nobody has opened, so that the functions that stat()
 * files report right sizes.
 */
#include "neon.h"

#include <dlfcn.h>
#include <signal.h>
#include <unistd.h>

#include "access/xlog.h"
#include "catalog/pg_tablespace_d.h"
#include "miscadmin.h"
#include "postmaster/bgworker.h"
#include "postmaster/interrupt.h"
#include "storage/bufpage.h"
#include "storage/ipc.h"
#include "storage/latch.h"
#include "utils/timestamp.h"
#include "utils/wait_event.h"

#define SCRATCH_DATABASE	1	/* template1 */
#define SCRATCH_RELATION	0xFFFFFFF0U
#define SCRATCH_BACKEND		1	/* a temporary relation's file: no fsync requests, removed at once */

static SMgrRelation
open_scratch(void)
{
#if PG_VERSION_NUM >= 160000
	RelFileLocator file = {.spcOid = DEFAULTTABLESPACE_OID,.dbOid = SCRATCH_DATABASE,.relNumber = SCRATCH_RELATION};
#else
	RelFileNode file = {.spcNode = DEFAULTTABLESPACE_OID,.dbNode = SCRATCH_DATABASE,.relNode = SCRATCH_RELATION};
#endif

	return smgropen(file, SCRATCH_BACKEND);
}

static void
scratch_read(SMgrRelation reln, BlockNumber block, char *buffer)
{
#if NEON_VECTORED
	void	   *buffers = buffer;

	smgrreadv(reln, MAIN_FORKNUM, block, &buffers, 1);
#else
	smgrread(reln, MAIN_FORKNUM, block, buffer);
#endif
}

static void
scratch_write(SMgrRelation reln, BlockNumber block, char *buffer)
{
#if NEON_VECTORED
	const void *buffers = buffer;

	smgrwritev(reln, MAIN_FORKNUM, block, &buffers, 1, true);
#else
	smgrwrite(reln, MAIN_FORKNUM, block, buffer, true);
#endif
}

static void
scratch_truncate(SMgrRelation reln, BlockNumber old_blocks, BlockNumber nblocks)
{
	ForkNumber	fork = MAIN_FORKNUM;

#if PG_VERSION_NUM < 180000
	smgrtruncate2(reln, &fork, 1, &old_blocks, &nblocks);
#endif
}

static void
stop_server(const char *what)
{
	ereport(LOG,
			(errmsg("the self-test of library \"neon\" failed: %s", what),
			 errdetail("Reads of this build would bypass the library. The server is stopped before it serves wrong data. Build: %s.",
					   PG_VERSION_STR)));
	kill(PostmasterPid, SIGQUIT);
	proc_exit(1);
}

static void
self_test(void)
{
	SMgrRelation reln = open_scratch();
	PGAlignedBlock written,
				read;
	uint64		before[NEON_WRAPPERS];

	memcpy(before, neon_wrapper_calls, sizeof(before));
	memset(written.data, 0x5A, BLCKSZ);
	smgrcreate(reln, MAIN_FORKNUM, false);
	if (!smgrexists(reln, MAIN_FORKNUM))
		stop_server("the scratch relation does not exist");
	smgrextend(reln, MAIN_FORKNUM, 0, written.data, true);
#if PG_VERSION_NUM >= 160000
	smgrzeroextend(reln, MAIN_FORKNUM, 1, 1, true);
#else
	smgrextend(reln, MAIN_FORKNUM, 1, written.data, true);
#endif
	memset(written.data, 0xA5, BLCKSZ);
	scratch_write(reln, 0, written.data);
#if NEON_VECTORED
	(void) smgrprefetch(reln, MAIN_FORKNUM, 0, 1);
#else
	(void) smgrprefetch(reln, MAIN_FORKNUM, 0);
#endif
	scratch_read(reln, 0, read.data);
	if (memcmp(read.data, written.data, BLCKSZ) != 0)
		stop_server("a block read back differs from what was written");
	if (smgrnblocks(reln, MAIN_FORKNUM) != 2)
		stop_server("the scratch relation has a wrong size");
	scratch_truncate(reln, 2, 1);
	smgrdounlinkall(&reln, 1, false);
	smgrclose(reln);
	for (int i = 0; i < neon_overrides_count; i++)
		if (neon_wrapper_calls[neon_overrides[i].kind] == before[neon_overrides[i].kind])
			stop_server(psprintf("%s() was called without the library", neon_overrides[i].name));
	pg_atomic_write_u32(&neon_shared->selftest_passed, 1);
}

/* True when the time has passed; false when the worker is asked to stop. */
static bool
wait_ms(long delay_ms)
{
	TimestampTz until = TimestampTzPlusMilliseconds(GetCurrentTimestamp(), delay_ms);
	TimestampTz now;

	while (!ShutdownRequestPending && (now = GetCurrentTimestamp()) < until)
	{
		(void) WaitLatch(MyLatch, WL_LATCH_SET | WL_TIMEOUT | WL_EXIT_ON_PM_DEATH,
						 TimestampDifferenceMilliseconds(now, until), PG_WAIT_EXTENSION);
		ResetLatch(MyLatch);
	}
	return !ShutdownRequestPending;
}

static void
make_files(void)
{
	TimestampTz started = GetCurrentTimestamp();
	uint64		made = 0;

	for (uint64 i = 0; i < neon_map->nslots && !ShutdownRequestPending; i++)
	{
		NeonMapEntry *entry = &neon_entries[i];

		if (__atomic_load_n(&entry->state, __ATOMIC_ACQUIRE) != NEON_ENTRY_NO_FILE)
			continue;
		if (neon_entry_ensure_files(entry, true))	/* false: its database was dropped meanwhile */
			made++;
		CHECK_FOR_INTERRUPTS();
	}
	ereport(LOG,
			(errmsg("made the files of " UINT64_FORMAT " relation forks in %ld ms", made,
					TimestampDifferenceMilliseconds(started, GetCurrentTimestamp()))));
}

void
neon_worker_main(Datum arg)
{
	pqsignal(SIGTERM, SignalHandlerForShutdownRequest);
	BackgroundWorkerUnblockSignals();
	self_test();
	if (neon_fill_delay < 0 || !wait_ms(neon_fill_delay))
		proc_exit(0);
	while (RecoveryInProgress())
		if (!wait_ms(100))
			proc_exit(0);
	make_files();
	proc_exit(0);
}

void
neon_register_worker(void)
{
	BackgroundWorker worker = {0};
	Dl_info		library;

	/* the worker's process finds the function in the file that is loaded already */
	if (dladdr((void *) neon_worker_main, &library) == 0 || strlen(library.dli_fname) >= sizeof(worker.bgw_library_name))
		ereport(FATAL, (errmsg("the path of library \"neon\" is longer than %zu bytes", sizeof(worker.bgw_library_name) - 1)));

	strlcpy(worker.bgw_name, "neon filler", BGW_MAXLEN);
	strlcpy(worker.bgw_type, "neon filler", BGW_MAXLEN);
	strlcpy(worker.bgw_library_name, library.dli_fname, sizeof(worker.bgw_library_name));
	strlcpy(worker.bgw_function_name, "neon_worker_main", BGW_MAXLEN);
	worker.bgw_flags = BGWORKER_SHMEM_ACCESS;
	worker.bgw_start_time = BgWorkerStart_PostmasterStart;
	worker.bgw_restart_time = BGW_NEVER_RESTART;
	RegisterBackgroundWorker(&worker);
}
