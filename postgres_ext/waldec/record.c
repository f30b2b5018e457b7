/*
 * Parsing one complete WAL record.  Every read is checked against the record's
 * length: a right CRC says that the bytes are what was written, not that they
 * make sense.
 */
#include "postgres.h"

#include "access/heapam_xlog.h"
#include "access/rmgr.h"
#include "access/xlogrecord.h"
#include "catalog/storage_xlog.h"
#include "storage/bufpage.h"

#include "record.h"

#if PG_VERSION_NUM < 150000 || PG_VERSION_NUM >= 190000
#error "the WAL decoder knows the records of Postgres 15 to 18"
#endif

/* visibilitymap.c keeps these to itself */
#define MAP_BYTES (BLCKSZ - MAXALIGN(SizeOfPageHeaderData))
#define HEAP_BLOCKS_PER_MAP_PAGE (MAP_BYTES * 4)

/* RelFileNode (15) and RelFileLocator (16 and later) are the same three words. */
typedef struct RelationId
{
	uint32_t	spc;
	uint32_t	db;
	uint32_t	rel;
} RelationId;

/* What is left of the record's headers. */
typedef struct Cursor
{
	const uint8_t *at;
	uint32_t	left;
} Cursor;

static inline bool
take(Cursor *cursor, void *to, uint32_t len)
{
	if (cursor->left < len)
		return false;
	memcpy(to, cursor->at, len);
	cursor->at += len;
	cursor->left -= len;
	return true;
}

static inline bool
skip(Cursor *cursor, uint32_t len)
{
	if (cursor->left < len)
		return false;
	cursor->at += len;
	cursor->left -= len;
	return true;
}

/* The image part of a block header; adds the image's bytes to *data_len. */
static bool
take_image_header(Cursor *cursor, uint8_t *flags, uint64_t *data_len)
{
	uint16_t	image_len;
	uint8_t		image_info;

	if (!take(cursor, &image_len, sizeof(image_len)) || !skip(cursor, sizeof(uint16_t)) ||
		!take(cursor, &image_info, sizeof(image_info)))
		return false;
	if (BKPIMAGE_COMPRESSED(image_info) && (image_info & BKPIMAGE_HAS_HOLE) && !skip(cursor, sizeof(uint16_t)))
		return false;
	*data_len += image_len;
	*flags |= REF_IMAGE;
	if (image_info & BKPIMAGE_APPLY)
		*flags |= REF_FPI;
	return true;
}

static RefRow *
add_ref(ParsedRecord *parsed, const RelationId *relation, uint32_t blk, uint8_t fork)
{
	RefRow	   *ref = &parsed->refs[parsed->nrefs++];

	memset(ref, 0, sizeof(*ref));
	ref->spc = relation->spc;
	ref->db = relation->db;
	ref->rel = relation->rel;
	ref->blk = blk;
	ref->fork = fork;
	return ref;
}

/* One block header whose id was already taken. */
static const char *
parse_block(Cursor *cursor, uint8_t id, ParsedRecord *parsed, RelationId *relation, uint64_t *data_len)
{
	bool		first = parsed->nrefs == 0;
	uint8_t		fork_flags;
	uint16_t	block_data_len;
	uint8_t		flags = 0;
	uint32_t	blk;
	RefRow	   *ref;

	if (!first && id <= parsed->refs[parsed->nrefs - 1].block_id)
		return "block ids out of order";
	if (!take(cursor, &fork_flags, sizeof(fork_flags)) || !take(cursor, &block_data_len, sizeof(block_data_len)))
		return "truncated block header";
	*data_len += block_data_len;
	if (fork_flags & BKPBLOCK_HAS_DATA)
		flags |= REF_DATA;
	if (fork_flags & BKPBLOCK_WILL_INIT)
		flags |= REF_WILL_INIT;
	if ((fork_flags & BKPBLOCK_HAS_IMAGE) && !take_image_header(cursor, &flags, data_len))
		return "truncated image header";
	if (!(fork_flags & BKPBLOCK_SAME_REL))
	{
		if (!take(cursor, relation, sizeof(*relation)))
			return "truncated block header";
	}
	else if (first)
		return "the first block refers to the relation of the one before";
	if (!take(cursor, &blk, sizeof(blk)))
		return "truncated block header";
	ref = add_ref(parsed, relation, blk, fork_flags & BKPBLOCK_FORK_MASK);
	ref->flags = flags;
	ref->block_id = id;
	return NULL;
}

/* The headers up to and including the main data's; then only data may be left. */
static const char *
parse_headers(Cursor *cursor, ParsedRecord *parsed)
{
	RelationId	relation = {0, 0, 0};
	uint64_t	data_len = 0;

	while (cursor->left > data_len)
	{
		uint8_t		id;
		uint8_t		short_len;
		const char *problem;

		if (!take(cursor, &id, sizeof(id)))
			return "truncated header";
		if (id == XLR_BLOCK_ID_DATA_SHORT)
		{
			if (!take(cursor, &short_len, sizeof(short_len)))
				return "truncated main data header";
			parsed->main_len = short_len;
			data_len += short_len;
			break;
		}
		else if (id == XLR_BLOCK_ID_DATA_LONG)
		{
			if (!take(cursor, &parsed->main_len, sizeof(parsed->main_len)))
				return "truncated main data header";
			data_len += parsed->main_len;
			break;
		}
		else if (id == XLR_BLOCK_ID_ORIGIN)
		{
			if (!skip(cursor, sizeof(RepOriginId)))
				return "truncated replication origin";
		}
		else if (id == XLR_BLOCK_ID_TOPLEVEL_XID)
		{
			if (!take(cursor, &parsed->toplevel_xid, sizeof(parsed->toplevel_xid)))
				return "truncated top-level transaction id";
		}
		else if (id > XLR_MAX_BLOCK_ID)
			return "unknown block id";
		else if ((problem = parse_block(cursor, id, parsed, &relation, &data_len)) != NULL)
			return problem;
	}
	return cursor->left == data_len ? NULL : "lengths in the headers do not add up";
}

/* Add the visibility map page of a heap block, unless the record has it already. */
static void
imply_map_page(ParsedRecord *parsed, const RelationId *relation, uint32_t heap_blk)
{
	uint32_t	map_blk = heap_blk / HEAP_BLOCKS_PER_MAP_PAGE;
	RefRow	   *ref;

	for (uint32_t i = 0; i < parsed->nrefs; i++)
		if (parsed->refs[i].fork == VISIBILITYMAP_FORKNUM && parsed->refs[i].blk == map_blk)
			return;
	ref = add_ref(parsed, relation, map_blk, VISIBILITYMAP_FORKNUM);
	ref->flags = REF_IMPLIED_VM;
	ref->block_id = REF_IMPLIED_BLOCK_ID;
}

/* One byte of the main data, 0 when the main data is shorter than it must be. */
static inline uint8_t
main_byte(const uint8_t *raw, const ParsedRecord *parsed, size_t offset, size_t needed)
{
	return parsed->main_len >= needed ? raw[parsed->main_off + offset] : 0;
}

/* The heap block that loses its bits when an update's old tuple was elsewhere. */
static uint32_t
old_heap_block(const ParsedRecord *parsed)
{
	/* by id: minors of 17 and 18 register the map pages in between */
	for (uint32_t i = 0; i < parsed->nrefs; i++)
		if (parsed->refs[i].block_id == 1 && parsed->refs[i].fork == MAIN_FORKNUM)
			return parsed->refs[i].blk;
	return parsed->refs[0].blk;
}

static void
imply_for_update(const uint8_t *raw, ParsedRecord *parsed, const RelationId *relation)
{
	uint8_t		flags = main_byte(raw, parsed, offsetof(xl_heap_update, flags), SizeOfHeapUpdate);
	uint32_t	new_blk = parsed->refs[0].blk;
	uint32_t	old_blk = old_heap_block(parsed);

	if (flags & XLH_UPDATE_OLD_ALL_VISIBLE_CLEARED)
		imply_map_page(parsed, relation, old_blk);
	if (flags & XLH_UPDATE_NEW_ALL_VISIBLE_CLEARED)
		imply_map_page(parsed, relation, new_blk);
}

static void
imply_for_heap(const uint8_t *raw, uint8_t operation, ParsedRecord *parsed, const RelationId *relation)
{
	bool		clears = false;

	switch (operation)
	{
		case XLOG_HEAP_INSERT:
			clears = main_byte(raw, parsed, offsetof(xl_heap_insert, flags), SizeOfHeapInsert) & XLH_INSERT_ALL_VISIBLE_CLEARED;
			break;
		case XLOG_HEAP_DELETE:
			clears = main_byte(raw, parsed, offsetof(xl_heap_delete, flags), SizeOfHeapDelete) & XLH_DELETE_ALL_VISIBLE_CLEARED;
			break;
		case XLOG_HEAP_LOCK:
			clears = main_byte(raw, parsed, offsetof(xl_heap_lock, flags), SizeOfHeapLock) & XLH_LOCK_ALL_FROZEN_CLEARED;
			break;
		case XLOG_HEAP_UPDATE:
		case XLOG_HEAP_HOT_UPDATE:
			imply_for_update(raw, parsed, relation);
			break;
		default:
			break;
	}
	if (clears)
		imply_map_page(parsed, relation, parsed->refs[0].blk);
}

static void
imply_for_heap2(const uint8_t *raw, uint8_t operation, ParsedRecord *parsed, const RelationId *relation)
{
	bool		clears = false;

	if (operation == XLOG_HEAP2_MULTI_INSERT)
		clears = main_byte(raw, parsed, offsetof(xl_heap_multi_insert, flags), SizeOfHeapMultiInsert) & XLH_INSERT_ALL_VISIBLE_CLEARED;
	else if (operation == XLOG_HEAP2_LOCK_UPDATED)
		clears = main_byte(raw, parsed, offsetof(xl_heap_lock_updated, flags), SizeOfHeapLockUpdated) & XLH_LOCK_ALL_FROZEN_CLEARED;
	if (clears)
		imply_map_page(parsed, relation, parsed->refs[0].blk);
}

/* Redo of a truncation clears the tail of the last map page that is kept. */
static void
imply_for_truncate(const uint8_t *raw, ParsedRecord *parsed)
{
	xl_smgr_truncate truncate;
	RelationId	relation;

	if (parsed->main_len < sizeof(truncate))
		return;
	memcpy(&truncate, raw + parsed->main_off, sizeof(truncate));
#if PG_VERSION_NUM >= 160000
	memcpy(&relation, &truncate.rlocator, sizeof(relation));
#else
	memcpy(&relation, &truncate.rnode, sizeof(relation));
#endif
	if ((truncate.flags & SMGR_TRUNCATE_VM) && truncate.blkno % HEAP_BLOCKS_PER_MAP_PAGE != 0)
		imply_map_page(parsed, &relation, truncate.blkno);
}

static void
add_implied(const uint8_t *raw, const XLogRecord *header, ParsedRecord *parsed)
{
	uint8_t		operation = header->xl_info & XLOG_HEAP_OPMASK;

	if (header->xl_rmid == RM_SMGR_ID)
	{
		if ((header->xl_info & ~XLR_INFO_MASK) == XLOG_SMGR_TRUNCATE)
			imply_for_truncate(raw, parsed);
	}
	else if (parsed->nrefs > 0)
	{
		RelationId	relation = {parsed->refs[0].spc, parsed->refs[0].db, parsed->refs[0].rel};

		if (header->xl_rmid == RM_HEAP_ID)
			imply_for_heap(raw, operation, parsed, &relation);
		else if (header->xl_rmid == RM_HEAP2_ID)
			imply_for_heap2(raw, operation, parsed, &relation);
	}
}

const char *
parse_record(const uint8_t *raw, uint32_t len, ParsedRecord *parsed)
{
	Cursor		cursor = {raw + SizeOfXLogRecord, len - SizeOfXLogRecord};
	XLogRecord	header;
	const char *problem;

	StaticAssertStmt(sizeof(RelationId) == 12, "three words");
	parsed->main_len = 0;
	parsed->toplevel_xid = 0;
	parsed->nrefs = 0;
	if ((problem = parse_headers(&cursor, parsed)) != NULL)
		return problem;
	memcpy(&header, raw, SizeOfXLogRecord);
	parsed->main_off = len - parsed->main_len;
	add_implied(raw, &header, parsed);
	return NULL;
}
