/*
 * neon_redo: makes an unpatched `postgres` binary a WAL redo helper.
 *
 * Started as `LD_PRELOAD=neon_redo.so postgres`.  main.c replaces main(), so
 * nothing of the server's own start happens: no data directory, no
 * configuration, no files, no IPC objects.  boot.c makes just enough of a
 * backend for redo routines to run in, smgr.c swaps the storage manager for
 * one that has a single page, pages.c applies records to that page,
 * protocol.c talks on stdin and stdout, sandbox.c forbids everything else.
 *
 * How one page is kept apart from the others of a multi-block record: the
 * storage manager says that every relation has every block.  Reading the target
 * block gives the base page; reading any other gives a valid, empty page with
 * the highest LSN, which redo takes for already up to date and leaves alone.
 * Blocks other than the target are renamed into a database that does not exist,
 * so that their buffers can be thrown away after each record.
 */
#ifndef NEON_REDO_H
#define NEON_REDO_H

#include "postgres.h"

#include "access/rmgr.h"
#include "access/xlog_internal.h"
#include "access/xlogreader.h"
#include "storage/block.h"
#include "storage/bufpage.h"
#if PG_VERSION_NUM >= 160000
#include "storage/relfilelocator.h"
#else
#include "storage/relfilenode.h"
#endif

#if PG_VERSION_NUM < 150000 || PG_VERSION_NUM >= 190000
#error "the redo helper is written for Postgres 15 to 18"
#endif

/* 16 renamed RelFileNode and its fields; the names of 16 are used here */
#if PG_VERSION_NUM < 160000
typedef RelFileNode RelFileLocator;
#define rlocator rnode
#define spcOid spcNode
#define dbOid dbNode
#define relNumber relNode
#define smgr_rlocator smgr_rnode
#define locator node
#define RelFileLocatorEquals RelFileNodeEquals
#define DropRelationBuffers DropRelFileNodeBuffers
#endif

/* where blocks other than the target live while a record is applied */
#define ELSEWHERE_DB ((Oid) 0xFFFFFFF0)

/* heap blocks per visibility map page; visibilitymap.c keeps it to itself */
#define MAP_BYTES (BLCKSZ - MAXALIGN(SizeOfPageHeaderData))
#define HEAP_BLOCKS_PER_MAP_PAGE (MAP_BYTES * 4)

/* The page that is being reconstructed. */
typedef struct TargetPage
{
	RelFileLocator rlocator;
	ForkNumber	fork;
	BlockNumber blk;
	char		page[BLCKSZ];	/* what the storage manager gives and takes */
} TargetPage;

/* Requests and answers, little-endian, the same on both sides of the pipe. */
#define FRAME_MAGIC UINT32_C(0x314F4452)	/* "RDO1" */

enum FrameOp
{
	OP_REDO = 1,				/* apply records to pages */
	OP_VERIFY = 2,				/* the same, and compare with consistency images */
	OP_MASK = 3,				/* blank what redo need not reproduce */
	OP_PING = 4					/* the answer's "n" is PG_VERSION_NUM */
};

enum PageStatus
{
	PAGE_DONE = 0,
	PAGE_ERROR = 1,			/* "page" is the text of the error */
	PAGE_MISSING_BASE = 2		/* the records need an existing page and none was given */
};

typedef struct FrameHeader
{
	uint32		magic;
	uint32		op;
	uint32		n;				/* requests or answers in the body */
	uint32		len;			/* bytes of the body */
} FrameHeader;

/* Followed by the base page, if any, and the entries [u64 end_lsn][raw record][pad to 8]. */
typedef struct PageRequest
{
	uint32		spc;
	uint32		db;
	uint32		rel;
	uint32		blk;
	uint8		fork;
	uint8		has_base;
	uint16		unused;
	uint32		nrecords;
	uint32		entries_len;
	uint32		unused2;
} PageRequest;

typedef struct PageAnswer
{
	uint32		status;
	uint32		compared;		/* OP_VERIFY: images compared */
	uint32		mismatches;		/* OP_VERIFY: images that differ */
	uint32		first_mismatch; /* OP_VERIFY: index of the first such record */
	char		page[BLCKSZ];
} PageAnswer;

typedef struct MaskRequest
{
	uint32		rmid;
	uint32		blk;
	char		page[BLCKSZ];
} MaskRequest;

/* main.c */
extern void die(const char *format, ...) pg_attribute_printf(1, 2) __attribute__((noreturn));

/* boot.c */
extern void boot_backend(void);

/* errors.c */
extern bool run_guarded(void (*work) (void *), void *argument, char *text, size_t text_size);
extern void install_error_capture(void);

/* pages.c */
extern void start_pages(void);
extern void redo_page(const PageRequest *request, const char *body, bool verify, PageAnswer *answer);
extern void forget_pages(void);
extern void mask_page(uint32 rmid, BlockNumber blk, char *page);

/* protocol.c */
extern void serve_forever(void) __attribute__((noreturn));

/* sandbox.c */
extern void enter_sandbox(void);

/* smgr.c */
extern TargetPage target;
extern char up_to_date_page[BLCKSZ];
extern void install_storage_manager(void);

#endif
