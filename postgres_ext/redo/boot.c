/*
 * As much of a backend as redo routines need, in private memory: memory
 * contexts, settings, "shared" memory with locks and a small buffer pool, and
 * the work memory of each resource manager.
 */
#include "redo.h"

#include <sys/mman.h>
#include <unistd.h>

#include "access/xlog.h"
#include "access/xlogutils.h"
#include "miscadmin.h"
#include "storage/buf_internals.h"
#include "storage/bufmgr.h"
#include "storage/lwlock.h"
#include "storage/pg_shmem.h"
#include "storage/proc.h"
#include "storage/shmem.h"
#include "utils/guc.h"
#include "utils/memutils.h"
#include "utils/resowner.h"
#if PG_VERSION_NUM >= 180000
#include "storage/aio.h"
#include "storage/aio_subsys.h"
#define InitBufferPool BufferManagerShmemInit
#define InitBufferPoolAccess InitBufferManagerAccess
#endif

extern bool ignore_invalid_pages;	/* a setting without a header in 15 */

/*
 * All blocks of a record may be pinned at once: 33, and the map pages that heap
 * redo pins besides.
 */
#define BUFFERS 64

/* Anonymous memory that plays the shared memory segment. */
static void
make_shared_memory(void)
{
	Size		size = (Size) NBuffers * (BLCKSZ + 512) + 6 * 1024 * 1024;
	PGShmemHeader *header = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (header == MAP_FAILED)
		die("neon_redo: no memory for the buffer pool: %m");
	header->magic = PGShmemMagic;
	header->creatorPID = getpid();
	header->totalsize = size;
	header->freeoffset = MAXALIGN(sizeof(PGShmemHeader));
	InitShmemAccess(header);
	InitShmemAllocation();
	CreateLWLocks();
	InitShmemIndex();
	XLOGShmemInit();			/* RecoveryInProgress() and the checksum setting look here */
	InitBufferPool();
#if PG_VERSION_NUM >= 180000
	SetConfigOption("io_method", "sync", PGC_POSTMASTER, PGC_S_ARGV);
	io_max_concurrency = 8;
	AioShmemInit();
#endif
}

static void
apply_settings(void)
{
	DataDir = "/";
	NBuffers = BUFFERS;
	MaxBackends = 1;
	XLOGbuffers = 8;
	log_min_messages = ERROR;	/* else the hook in errors.c is not called for errors */
	client_min_messages = ERROR;
	Log_destination = 0;
	ignore_invalid_pages = true;
	zero_damaged_pages = false;
}

static void
become_backend(void)
{
	MyProc = calloc(1, sizeof(PGPROC)); /* condition variables look at it */
	if (MyProc == NULL)
		die("neon_redo: out of memory");
#if PG_VERSION_NUM >= 170000
	MyProcNumber = 0;
#endif
	InitBufferPoolAccess();
#if PG_VERSION_NUM >= 180000
	pgaio_init_backend();
#endif
	CurrentResourceOwner = ResourceOwnerCreate(NULL, "wal redo");
	InRecovery = true;
	SetProcessingMode(NormalProcessing);
}

void
boot_backend(void)
{
	MyProcPid = getpid();
	MemoryContextInit();
	(void) set_stack_base();
	InitializeGUCOptions();
	apply_settings();
	install_error_capture();
	make_shared_memory();
	install_storage_manager();
	become_backend();
	for (int rmid = 0; rmid <= RM_MAX_BUILTIN_ID; rmid++)
		if (RmgrTable[rmid].rm_startup)
			RmgrTable[rmid].rm_startup();
	start_pages();
}
