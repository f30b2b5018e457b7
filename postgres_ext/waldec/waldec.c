/*
 * The record decoder of pageservers: WAL bytes in, rows and one blob of whole
 * records out.
 *
 * Rows and blob belong to the decoder until waldec_consume(); indexes in rows
 * count from the previous waldec_consume().  A record that is not complete yet
 * stays at the end of the blob.
 */
#include "postgres.h"

#include <stdlib.h>

#include "access/xlog_internal.h"

#include "record.h"
#include "waldec.h"

#define ALIGN8(n) (((n) + 7) & ~UINT64_C(7))

StaticAssertDecl(sizeof(RecRow) == 48, "Python reads RecRow as 48 bytes");
StaticAssertDecl(sizeof(RefRow) == 32, "Python reads RefRow as 32 bytes");
StaticAssertDecl(SizeOfXLogRecord == WAL_RECORD_HEADER, "record header");
StaticAssertDecl(SizeOfXLogShortPHD == WAL_SHORT_HEADER, "short page header");
StaticAssertDecl(SizeOfXLogLongPHD == WAL_LONG_HEADER, "long page header");
StaticAssertDecl(XLOG_BLCKSZ == WAL_PAGE_SIZE, "WAL page size");

struct WalDec
{
	WalStream	stream;
	uint64_t	decoded_end;	/* end LSN of the last complete record */

	RecRow	   *records;
	size_t		nrecords;
	size_t		records_capacity;

	RefRow	   *refs;
	size_t		nrefs;
	size_t		refs_capacity;

	uint8_t    *blob;
	size_t		blob_len;		/* of complete entries; the unfinished one follows */
	size_t		blob_capacity;
};

/*
 * Make room for "needed" elements, doubling.  The memory may move.  False, and
 * nothing changed, when there is no memory.
 */
static bool
reserve(void **array, size_t *capacity, size_t needed, size_t element, size_t minimum)
{
	size_t		wanted = *capacity ? *capacity : minimum;
	void	   *grown;

	if (needed <= *capacity)
		return true;
	while (wanted < needed)
		wanted *= 2;
	grown = realloc(*array, wanted * element);
	if (grown == NULL)
		return false;
	*array = grown;
	*capacity = wanted;
	return true;
}

static int
no_memory(WalStream *stream)
{
	return walstream_fail(stream, WAL_NO_MEMORY, "out of memory for the record", stream->record_lsn);
}

static int
on_begin(WalStream *stream, void *owner)
{
	WalDec	   *dec = owner;

	/* offsets in rows have 32 bits */
	if (dec->blob_len > UINT32_MAX)
		return walstream_fail(stream, WAL_NO_MEMORY, "more than 4 GiB of records in one batch", stream->record_lsn);
	return 0;
}

static int
on_bytes(WalStream *stream, void *owner, const uint8_t *data, size_t len)
{
	WalDec	   *dec = owner;
	size_t		at = dec->blob_len + sizeof(uint64_t) + stream->record_have - len;

	if (!reserve((void **) &dec->blob, &dec->blob_capacity, ALIGN8(at + len), 1, 1 << 20))
		return no_memory(stream);
	memcpy(dec->blob + at, data, len);
	return 0;
}

static void
fill_record(const WalDec *dec, const ParsedRecord *parsed, uint64_t end_lsn, RecRow *row)
{
	XLogRecord	header;

	memcpy(&header, dec->stream.record_header, SizeOfXLogRecord);
	row->start_lsn = dec->stream.record_lsn;
	row->end_lsn = end_lsn;
	row->blob_off = (uint32_t) dec->blob_len;
	row->tot_len = dec->stream.record_len;
	row->xid = header.xl_xid;
	row->main_off = parsed->main_off;
	row->main_len = parsed->main_len;
	row->first_ref = (uint32_t) dec->nrefs;
	row->nref = (uint16_t) parsed->nrefs;
	row->rmid = header.xl_rmid;
	row->info = header.xl_info;
	row->toplevel_xid = parsed->toplevel_xid;
}

static int
on_end(WalStream *stream, void *owner, uint64_t end_lsn)
{
	WalDec	   *dec = owner;
	size_t		entry_len = sizeof(uint64_t) + stream->record_len;
	uint8_t    *entry = dec->blob + dec->blob_len;
	ParsedRecord parsed;
	const char *problem;
	RecRow	   *row;

	problem = parse_record(entry + sizeof(uint64_t), stream->record_len, &parsed);
	if (problem != NULL)
		return walstream_fail(stream, WAL_INVALID, problem, stream->record_lsn);
	if (!reserve((void **) &dec->records, &dec->records_capacity, dec->nrecords + 1, sizeof(RecRow), 4096) ||
		!reserve((void **) &dec->refs, &dec->refs_capacity, dec->nrefs + parsed.nrefs, sizeof(RefRow), 4096))
		return no_memory(stream);
	memcpy(entry, &end_lsn, sizeof(end_lsn));
	memset(entry + entry_len, 0, ALIGN8(entry_len) - entry_len);
	row = &dec->records[dec->nrecords];
	fill_record(dec, &parsed, end_lsn, row);
	for (uint32_t i = 0; i < parsed.nrefs; i++)
	{
		RefRow	   *ref = &dec->refs[dec->nrefs++];

		*ref = parsed.refs[i];
		ref->end_lsn = end_lsn;
		ref->rec = (uint32_t) dec->nrecords;
		ref->rmid = row->rmid;
	}
	dec->nrecords++;
	dec->blob_len += ALIGN8(entry_len);
	dec->decoded_end = end_lsn;
	return 0;
}

static void
on_abandon(WalStream *stream, void *owner)
{
	/* the next record overwrites what there is of it */
	(void) stream;
	(void) owner;
}

static const WalSink decode_sink = {on_begin, on_bytes, on_end, on_abandon};

/* NULL when out of memory, or when no segment has this size. */
WalDec *
waldec_new(uint64_t start_lsn, uint32_t segment_size, int verify_crc)
{
	WalDec	   *dec;

	if (!walstream_segment_size_is_possible(segment_size))
		return NULL;
	dec = calloc(1, sizeof(WalDec));
	if (dec == NULL)
		return NULL;
	dec->stream.sink = &decode_sink;
	dec->stream.owner = dec;
	dec->stream.segment_size = segment_size;
	dec->stream.magic = XLOG_PAGE_MAGIC;
	dec->stream.verify_crc = verify_crc != 0;
	walstream_start(&dec->stream, start_lsn);
	dec->decoded_end = ALIGN8(start_lsn);
	return dec;
}

void
waldec_free(WalDec *dec)
{
	if (dec == NULL)
		return;
	free(dec->records);
	free(dec->refs);
	free(dec->blob);
	free(dec);
}

/*
 * 0, or a WalStop number: the text is in waldec_error().  What was complete
 * before the error is in waldec_result() either way.
 */
int
waldec_feed(WalDec *dec, const uint8_t *data, size_t len)
{
	return walstream_feed(&dec->stream, data, len) < 0 ? (int) dec->stream.stop : 0;
}

void
waldec_result(const WalDec *dec, WalDecResult *result)
{
	result->records = (uint64_t) (uintptr_t) dec->records;
	result->nrecords = dec->nrecords;
	result->refs = (uint64_t) (uintptr_t) dec->refs;
	result->nrefs = dec->nrefs;
	result->blob = (uint64_t) (uintptr_t) dec->blob;
	result->blob_len = dec->blob_len;
	result->position = dec->stream.position;
	result->record_end = dec->decoded_end;
}

/* Forget the delivered rows and records; keep the record that is not complete. */
void
waldec_consume(WalDec *dec)
{
	if (dec->stream.in_record && dec->blob_len > 0)
		memmove(dec->blob + sizeof(uint64_t), dec->blob + dec->blob_len + sizeof(uint64_t), dec->stream.record_have);
	dec->blob_len = 0;
	dec->nrecords = 0;
	dec->nrefs = 0;
}

const char *
waldec_error(const WalDec *dec)
{
	return dec->stream.error;
}

int
waldec_pg_version_num(void)
{
	return PG_VERSION_NUM;
}
