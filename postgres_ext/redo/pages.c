/*
 * Applying records to one page.
 *
 * Only records of resource managers whose redo does nothing but change blocks
 * are handed to their redo routine; the decoded copy of each record is edited
 * first, so that every block but the target points elsewhere.
 */
#include "redo.h"

#include <stdlib.h>

#include "access/heapam_xlog.h"
#include "access/xlog.h"
#include "access/xlogutils.h"
#include "catalog/pg_control.h"
#include "catalog/storage_xlog.h"
#include "storage/bufmgr.h"
#include "storage/smgr.h"
#include "utils/memutils.h"
#if PG_VERSION_NUM >= 180000
#include "storage/fsm_internals.h"
#endif

#if PG_VERSION_NUM >= 170000
#define NO_BACKEND INVALID_PROC_NUMBER
#define close_all_relations smgrdestroyall
#else
#define NO_BACKEND InvalidBackendId
#define close_all_relations smgrcloseall
#endif

/* pages between two clearings of the table of open relations */
#define PAGES_PER_CLEARING 1024

static MemoryContext page_context;
static XLogReaderState *reader;
static DecodedXLogRecord *decoded;
static size_t decoded_size;

void
start_pages(void)
{
	reader = XLogReaderAllocate(wal_segment_size, NULL, XL_ROUTINE(), NULL);
	if (reader == NULL)
		die("neon_redo: out of memory");
	page_context = AllocSetContextCreate(TopMemoryContext, "page redo", ALLOCSET_DEFAULT_SIZES);
}

static void
drop_buffers(void)
{
	DropDatabaseBuffers(target.rlocator.dbOid);
	DropDatabaseBuffers(ELSEWHERE_DB);
}

/* After an error: no page, buffer or memory of the failed work remains. */
void
forget_pages(void)
{
	drop_buffers();
	close_all_relations();
	MemoryContextReset(page_context);
}

static void
copy_target(char *to)
{
	Buffer		buffer = ReadBufferWithoutRelcache(target.rlocator, target.fork, target.blk, RBM_NORMAL, NULL, true);

	memcpy(to, BufferGetPage(buffer), BLCKSZ);
	ReleaseBuffer(buffer);
}

/*
 * From 18 on, reads go through asynchronous I/O, which wants descriptors and
 * shared statistics.  So there nothing is ever read: each block that a record
 * may touch is put into the buffer pool beforehand.
 */
#if PG_VERSION_NUM >= 180000
static void
put_into_pool(RelFileLocator rlocator, ForkNumber fork, BlockNumber blk, const char *page)
{
	Buffer		buffer = ReadBufferWithoutRelcache(rlocator, fork, blk, RBM_ZERO_AND_LOCK, NULL, true);

	memcpy(BufferGetPage(buffer), page, BLCKSZ);
	UnlockReleaseBuffer(buffer);
}

static void
offer_target(void)
{
	put_into_pool(target.rlocator, target.fork, target.blk, target.page);
}

/* The free space map page that holds the leaf of a heap block. */
static BlockNumber
fsm_block(BlockNumber heap_blk)
{
	BlockNumber leaf = heap_blk / SlotsPerFSMPage;
	BlockNumber blk = 0;

	for (int level = 0; level < 3; level++)
	{
		blk += leaf + 1;
		leaf /= SlotsPerFSMPage;
	}
	return blk - 1;
}

static void
offer_heap_maps(const DecodedBkpBlock *block)
{
	if (target.fork != VISIBILITYMAP_FORKNUM)
		put_into_pool(block->rlocator, VISIBILITYMAP_FORKNUM, block->blkno / HEAP_BLOCKS_PER_MAP_PAGE, up_to_date_page);
	put_into_pool(block->rlocator, FSM_FORKNUM, fsm_block(block->blkno), up_to_date_page);
}

static void
offer_other_blocks(const DecodedXLogRecord *record, int target_id)
{
	bool		heap = record->header.xl_rmid == RM_HEAP_ID || record->header.xl_rmid == RM_HEAP2_ID;

	for (int id = 0; id <= record->max_block_id; id++)
	{
		const DecodedBkpBlock *block = &record->blocks[id];

		if (!block->in_use)
			continue;
		if (id != target_id && !block->apply_image && !(block->flags & BKPBLOCK_WILL_INIT))
			put_into_pool(block->rlocator, block->forknum, block->blkno, up_to_date_page);
		if (heap && block->forknum == MAIN_FORKNUM)
			offer_heap_maps(block);
	}
}

/* The invalidation messages of an in-place update have nobody to go to. */
static void
drop_messages(DecodedXLogRecord *record)
{
	if (record->header.xl_rmid == RM_HEAP_ID && (record->header.xl_info & XLOG_HEAP_OPMASK) == XLOG_HEAP_INPLACE)
	{
		xl_heap_inplace *inplace = (xl_heap_inplace *) record->main_data;

		inplace->nmsgs = 0;
		inplace->relcacheInitFileInval = false;
	}
}
#else
#define offer_target() ((void) 0)
#define offer_other_blocks(record, target_id) ((void) 0)
#define drop_messages(record) ((void) 0)
#endif

/* Replace the page as the pool has it by target.page. */
static void
take_new_target(void)
{
	drop_buffers();
	offer_target();
}

static void
decode(const XLogRecord *raw, XLogRecPtr end_lsn)
{
	size_t		needed = DecodeXLogRecordRequiredSpace(raw->xl_tot_len);
	char	   *problem = NULL;

	if (needed > decoded_size)
	{
		free(decoded);
		decoded_size = needed + 64 * 1024;
		decoded = malloc(decoded_size);
		if (decoded == NULL)
		{
			decoded_size = 0;
			elog(ERROR, "no memory for a record of %u bytes", raw->xl_tot_len);
		}
	}
	if (!DecodeXLogRecord(reader, decoded, (XLogRecord *) raw, end_lsn, &problem))
		elog(ERROR, "cannot decode the record ending at %X/%X: %s", LSN_FORMAT_ARGS(end_lsn), problem ? problem : "no text");
	decoded->next_lsn = end_lsn;
	reader->record = decoded;
	reader->ReadRecPtr = end_lsn;
	reader->EndRecPtr = end_lsn;
}

/*
 * Find the target among the record's blocks and point the others elsewhere; -1
 * when it is not among them.  A map page as the target needs the heap blocks
 * with their names, because redo finds the map by them.
 */
static int
aim(DecodedXLogRecord *record)
{
	/* GIN insists on restoring the image of every block */
	bool		keep_images = record->header.xl_rmid == RM_GIN_ID;
	int			found = -1;

	for (int id = 0; id <= record->max_block_id; id++)
	{
		DecodedBkpBlock *block = &record->blocks[id];

		if (!block->in_use)
			continue;
		if (found < 0 && block->blkno == target.blk && block->forknum == target.fork &&
			RelFileLocatorEquals(block->rlocator, target.rlocator))
		{
			found = id;
			continue;
		}
		if (target.fork != VISIBILITYMAP_FORKNUM)
			block->rlocator.dbOid = ELSEWHERE_DB;
		if (!keep_images)
			block->has_image = block->apply_image = false;
	}
	return found;
}

/* XLOG_FPI and XLOG_FPI_FOR_HINT: xlog_redo would insist on every block. */
static void
apply_image(int target_id, XLogRecPtr end_lsn)
{
	if (target_id < 0 || !decoded->blocks[target_id].has_image)
		elog(ERROR, "the record ending at %X/%X has no image of the page", LSN_FORMAT_ARGS(end_lsn));
	if (!RestoreBlockImage(reader, target_id, target.page))
		elog(ERROR, "cannot restore the image in the record ending at %X/%X", LSN_FORMAT_ARGS(end_lsn));
	if (!PageIsNew(target.page))
		PageSetLSN(target.page, end_lsn);
	take_new_target();
}

/* What smgr_redo does to the last map page that a truncation keeps. */
static void
truncate_map(XLogRecPtr end_lsn)
{
	xl_smgr_truncate truncate;
	uint32		position;
	char	   *map = target.page + MAXALIGN(SizeOfPageHeaderData);

	if (target.fork != VISIBILITYMAP_FORKNUM || XLogRecGetDataLen(reader) < sizeof(truncate))
		elog(ERROR, "the storage record ending at %X/%X does not change the page", LSN_FORMAT_ARGS(end_lsn));
	memcpy(&truncate, XLogRecGetData(reader), sizeof(truncate));
	position = truncate.blkno % HEAP_BLOCKS_PER_MAP_PAGE;
	if (truncate.blkno / HEAP_BLOCKS_PER_MAP_PAGE != target.blk || position == 0)
		return;
	copy_target(target.page);
	map[position / 4] &= (1 << (position % 4 * 2)) - 1;
	memset(map + position / 4 + 1, 0, MAP_BYTES - (position / 4 + 1));
	take_new_target();
}

/* Does redo of this record change blocks and nothing else? */
static bool
changes_only_blocks(RmgrId rmid, uint8 info)
{
	switch (rmid)
	{
		case RM_HEAP2_ID:
			return (info & XLOG_HEAP_OPMASK) != XLOG_HEAP2_REWRITE; /* writes a file */
		case RM_HEAP_ID:
		case RM_BTREE_ID:
		case RM_HASH_ID:
		case RM_GIN_ID:
		case RM_GIST_ID:
		case RM_SEQ_ID:
		case RM_SPGIST_ID:
		case RM_BRIN_ID:
		case RM_GENERIC_ID:
			return true;
		default:
			return false;
	}
}

static void
drop_other_buffers(void)
{
	ForkNumber	forks[2] = {MAIN_FORKNUM, FSM_FORKNUM};
	BlockNumber from[2] = {0, 0};

	if (target.fork == VISIBILITYMAP_FORKNUM)
		DropRelationBuffers(smgropen(target.rlocator, NO_BACKEND), forks, lengthof(forks), from);
	else if (decoded->max_block_id > 0)
		DropDatabaseBuffers(ELSEWHERE_DB);
}

/* The id of the target in the record, -1 when it is implied. */
static int
apply_record(XLogRecPtr end_lsn)
{
	RmgrId		rmid = decoded->header.xl_rmid;
	int			target_id = aim(decoded);

	if (rmid == RM_XLOG_ID)
		apply_image(target_id, end_lsn);
	else if (rmid == RM_SMGR_ID)
		truncate_map(end_lsn);
	else if (!changes_only_blocks(rmid, decoded->header.xl_info))
		elog(ERROR, "the record ending at %X/%X is of resource manager %u, which changes no pages",
			 LSN_FORMAT_ARGS(end_lsn), rmid);
	else if (target_id < 0 && target.fork != VISIBILITYMAP_FORKNUM)
		elog(ERROR, "the record ending at %X/%X does not touch the page", LSN_FORMAT_ARGS(end_lsn));
	else
	{
		offer_other_blocks(decoded, target_id);
		drop_messages(decoded);
		RmgrTable[rmid].rm_redo(reader);
		drop_other_buffers();
	}
	return target_id;
}

void
mask_page(uint32 rmid, BlockNumber blk, char *page)
{
	if (rmid <= RM_MAX_BUILTIN_ID && RmgrTable[rmid].rm_mask && !PageIsNew(page))
		RmgrTable[rmid].rm_mask(page, blk);
}

/* Compare the page with the image that wal_consistency_checking left in the record. */
static void
verify_record(int target_id, uint32 index, XLogRecPtr end_lsn, PageAnswer *answer)
{
	static char want[BLCKSZ] pg_attribute_aligned(64);
	static char have[BLCKSZ] pg_attribute_aligned(64);
	RmgrId		rmid = decoded->header.xl_rmid;

	if (target_id < 0 || !decoded->blocks[target_id].has_image || decoded->blocks[target_id].apply_image)
		return;
	if (!RestoreBlockImage(reader, target_id, want))
		elog(ERROR, "cannot restore the consistency image in the record ending at %X/%X", LSN_FORMAT_ARGS(end_lsn));
	copy_target(have);
	if (PageGetLSN(have) > end_lsn)
		return;
	mask_page(rmid, target.blk, want);
	mask_page(rmid, target.blk, have);
	if (memcmp(want, have, BLCKSZ) != 0 && answer->mismatches++ == 0)
		answer->first_mismatch = index;
	answer->compared++;
}

/* The next entry; moves *at behind it. */
static const XLogRecord *
next_entry(const char **at, const char *end, XLogRecPtr *end_lsn)
{
	const XLogRecord *raw = (const XLogRecord *) (*at + sizeof(XLogRecPtr));
	XLogRecPtr	previous = *end_lsn;
	size_t		left = end - *at;

	if (left < sizeof(XLogRecPtr) + SizeOfXLogRecord || raw->xl_tot_len < SizeOfXLogRecord ||
		raw->xl_tot_len > left - sizeof(XLogRecPtr))
		elog(ERROR, "the entries of the request end inside a record");
	memcpy(end_lsn, *at, sizeof(XLogRecPtr));
	if (*end_lsn <= previous)
		elog(ERROR, "the record ending at %X/%X is not after the one before it", LSN_FORMAT_ARGS(*end_lsn));
	*at += MAXALIGN(sizeof(XLogRecPtr) + raw->xl_tot_len);
	return raw;
}

static void
set_target(const PageRequest *request, const char *base)
{
	if (request->fork > MAX_FORKNUM)
		elog(ERROR, "there is no fork %u", request->fork);
	target.rlocator.spcOid = request->spc;
	target.rlocator.dbOid = request->db;
	target.rlocator.relNumber = request->rel;
	target.fork = request->fork;
	target.blk = request->blk;
	if (base != NULL)
		memcpy(target.page, base, BLCKSZ);
	else
		memset(target.page, 0, BLCKSZ);
	offer_target();
}

/* Redo that wanted a page which did not exist remembers it; forget it again. */
static bool
base_was_missing(void)
{
	if (!XLogHaveInvalidPages())
		return false;
	XLogCheckInvalidPages();	/* only warns, because ignore_invalid_pages is set */
	return true;
}

/* Raises errors; the caller runs it under run_guarded(). */
void
redo_page(const PageRequest *request, const char *body, bool verify, PageAnswer *answer)
{
	static uint32 served;
	const char *at = body + (request->has_base ? BLCKSZ : 0);
	const char *end = at + request->entries_len;
	XLogRecPtr	end_lsn = 0;

	answer->status = PAGE_DONE;
	answer->compared = answer->mismatches = answer->first_mismatch = 0;
	MemoryContextSwitchTo(page_context);
	set_target(request, request->has_base ? body : NULL);
	for (uint32 i = 0; i < request->nrecords; i++)
	{
		const XLogRecord *raw = next_entry(&at, end, &end_lsn);
		int			target_id;

		decode(raw, end_lsn);
		target_id = apply_record(end_lsn);
		if (verify)
			verify_record(target_id, i, end_lsn, answer);
	}
	copy_target(answer->page);
	drop_buffers();
	MemoryContextReset(page_context);
	if (base_was_missing())
	{
		answer->status = PAGE_MISSING_BASE;
		snprintf(answer->page, BLCKSZ, "the records need an existing page, and none was given");
	}
	if (++served % PAGES_PER_CLEARING == 0)
		close_all_relations();
}
