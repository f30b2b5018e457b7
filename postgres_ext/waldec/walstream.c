/*
 * Pages and record boundaries of the WAL stream.  See walstream.h.
 */
#include "walstream.h"

#include <stdio.h>
#include <string.h>

#include "crc32c.h"

/* xlp_info */
#define FIRST_IS_CONTRECORD 0x0001
#define LONG_HEADER 0x0002
#define FIRST_IS_OVERWRITE_CONTRECORD 0x0008

/* offsets in the page header */
#define XLP_MAGIC 0
#define XLP_INFO 2
#define XLP_PAGEADDR 8
#define XLP_REM_LEN 16
#define XLP_SEG_SIZE 32

/* offsets in the record header */
#define XL_INFO 16
#define XL_RMID 17
#define XL_CRC 20

#define RM_XLOG 0
#define XLOG_OPERATION_MASK 0xF0
#define XLOG_SWITCH_OPERATION 0x40

static const uint16_t known_magics[] = {0xD110, 0xD113, 0xD116, 0xD118};	/* 15, 16, 17, 18 */

static inline uint64_t
min_u64(uint64_t a, uint64_t b)
{
	return a < b ? a : b;
}

static inline uint64_t
align8(uint64_t lsn)
{
	return (lsn + 7) & ~UINT64_C(7);
}

static inline uint16_t
get_u16(const uint8_t *p)
{
	uint16_t	value;

	memcpy(&value, p, sizeof(value));
	return value;
}

static inline uint32_t
get_u32(const uint8_t *p)
{
	uint32_t	value;

	memcpy(&value, p, sizeof(value));
	return value;
}

static inline uint64_t
get_u64(const uint8_t *p)
{
	uint64_t	value;

	memcpy(&value, p, sizeof(value));
	return value;
}

/* Stop for good; the first error stays. Returns -1 so that callers can return it. */
int
walstream_fail(WalStream *stream, WalStop stop, const char *what, uint64_t lsn)
{
	if (stream->stop == WAL_GOING)
	{
		stream->stop = stop;
		(void) snprintf(stream->error, sizeof(stream->error), "%s at %X/%X", what,
						(unsigned) (lsn >> 32), (unsigned) lsn);
	}
	return -1;
}

bool
walstream_segment_size_is_possible(uint32_t segment_size)
{
	return segment_size >= WAL_PAGE_SIZE && segment_size % WAL_PAGE_SIZE == 0;
}

/* Begin at lsn.  The settings (sink, owner, sizes, flags) stay. */
void
walstream_start(WalStream *stream, uint64_t lsn)
{
	bool		at_page = lsn % WAL_PAGE_SIZE == 0;

	crc32c_init();
	stream->position = lsn;
	stream->record_end_lsn = lsn;
	stream->pending_end = align8(lsn) != lsn ? align8(lsn) : 0;
	stream->skip_to = 0;
	stream->page_header_have = 0;
	stream->need_page_header = at_page;
	stream->resync = at_page;
	stream->tail_left = 0;
	stream->in_record = false;
	stream->stop = WAL_GOING;
	stream->error[0] = '\0';
}

static bool
magic_is_right(const WalStream *stream, uint16_t magic)
{
	if (stream->magic != 0)
		return magic == stream->magic;
	for (size_t i = 0; i < sizeof(known_magics) / sizeof(known_magics[0]); i++)
		if (magic == known_magics[i])
			return true;
	return false;
}

static bool
all_zeros(const uint8_t *data, size_t len)
{
	for (size_t i = 0; i < len; i++)
		if (data[i] != 0)
			return false;
	return true;
}

/* Does the header belong to the page at this LSN? */
static int
check_page_header(WalStream *stream, uint64_t page, uint32_t size)
{
	const uint8_t *header = stream->page_header;
	bool		is_long = (get_u16(header + XLP_INFO) & LONG_HEADER) != 0;

	if (all_zeros(header, size))
		return walstream_fail(stream, WAL_ZERO_PAGE, "page of zeros", page);
	if (!magic_is_right(stream, get_u16(header + XLP_MAGIC)))
		return walstream_fail(stream, WAL_INVALID, "wrong page magic (damage, or WAL of another Postgres major)", page);
	if (get_u64(header + XLP_PAGEADDR) != page)
		return walstream_fail(stream, WAL_STALE_PAGE, "page header of another position", page);
	if (is_long != (size == WAL_LONG_HEADER))
		return walstream_fail(stream, WAL_INVALID, "page header of the wrong size", page);
	if (is_long && get_u32(header + XLP_SEG_SIZE) != stream->segment_size)
		return walstream_fail(stream, WAL_INVALID, "page header with another WAL segment size", page);
	return 0;
}

static void
abandon_record(WalStream *stream)
{
	if (stream->in_record)
	{
		stream->in_record = false;
		stream->sink->abandon(stream, stream->owner);
	}
}

/* What the header says about the record that crosses into this page. */
static int
continue_record(WalStream *stream, uint64_t page)
{
	uint16_t	info = get_u16(stream->page_header + XLP_INFO);
	uint32_t	remaining = get_u32(stream->page_header + XLP_REM_LEN);

	if (info & FIRST_IS_OVERWRITE_CONTRECORD)
	{
		abandon_record(stream);
		stream->tail_left = 0;
	}
	else if (info & FIRST_IS_CONTRECORD)
	{
		if (stream->in_record)
		{
			if (remaining != stream->record_len - stream->record_have)
				return walstream_fail(stream, WAL_INVALID, "continuation of another length than expected", page);
		}
		else if (stream->resync)
		{
			if (remaining == 0 || remaining > WAL_MAX_RECORD)
				return walstream_fail(stream, WAL_INVALID, "continuation of an impossible length", page);
			stream->tail_left = remaining;
		}
		else
			return walstream_fail(stream, WAL_INVALID, "unexpected continuation of a record", page);
	}
	else if (stream->in_record || stream->tail_left != 0)
		return walstream_fail(stream, WAL_INVALID, "missing continuation of a record", page);
	if (stream->tail_left == 0)
		stream->resync = false;
	return 0;
}

/* Consume up to len bytes of the page header; number consumed, or -1. */
static int64_t
take_page_header(WalStream *stream, const uint8_t *data, size_t len)
{
	uint64_t	page = stream->position - stream->page_header_have;
	uint32_t	size = page % stream->segment_size == 0 ? WAL_LONG_HEADER : WAL_SHORT_HEADER;
	size_t		n = min_u64(len, size - stream->page_header_have);

	memcpy(stream->page_header + stream->page_header_have, data, n);
	stream->page_header_have += (uint32_t) n;
	stream->position += n;
	if (stream->page_header_have < size)
		return (int64_t) n;
	stream->need_page_header = false;
	stream->page_header_have = 0;
	if (check_page_header(stream, page, size) < 0)
		return -1;
	if (continue_record(stream, page) < 0)
		return -1;
	return (int64_t) n;
}

/* Move over n bytes of the page body. */
static inline void
advance(WalStream *stream, uint64_t n)
{
	stream->position += n;
	if (stream->position % WAL_PAGE_SIZE == 0)
		stream->need_page_header = true;
	if (stream->pending_end != 0 && stream->position >= stream->pending_end)
	{
		stream->record_end_lsn = stream->pending_end;
		stream->pending_end = 0;
	}
}

/* The rest of a segment after XLOG_SWITCH is zeros, without page headers. */
static int64_t
skip_switched(WalStream *stream, size_t len)
{
	uint64_t	n = min_u64(len, stream->skip_to - stream->position);

	advance(stream, n);
	return (int64_t) n;
}

static int
check_crc(WalStream *stream)
{
	uint32_t	crc = crc32c_extend(stream->crc, stream->record_header, XL_CRC);

	if (crc32c_finish(crc) != get_u32(stream->record_header + XL_CRC))
		return walstream_fail(stream, WAL_INVALID, "wrong CRC of the record", stream->record_lsn);
	return 0;
}

static int
finish_record(WalStream *stream)
{
	const uint8_t *header = stream->record_header;
	uint64_t	end_lsn = align8(stream->position);

	if (stream->verify_crc && check_crc(stream) < 0)
		return -1;
	if (header[XL_RMID] == RM_XLOG && (header[XL_INFO] & XLOG_OPERATION_MASK) == XLOG_SWITCH_OPERATION)
	{
		uint64_t	segment = stream->segment_size;

		end_lsn = (end_lsn + segment - 1) / segment * segment;
		stream->skip_to = end_lsn;
	}
	stream->in_record = false;
	if (stream->sink->end(stream, stream->owner, end_lsn) < 0)
		return -1;
	stream->pending_end = end_lsn;
	advance(stream, 0);			/* publish it if there is no padding */
	return 0;
}

static int
begin_record(WalStream *stream)
{
	stream->in_record = true;
	stream->record_lsn = stream->position;
	stream->record_len = 0;
	stream->record_have = 0;
	stream->crc = CRC32C_START;
	return stream->sink->begin(stream, stream->owner);
}

/* xl_tot_len has arrived (records are aligned, so a page never cuts it). */
static int
learn_length(WalStream *stream)
{
	uint32_t	total = get_u32(stream->record_header);

	if (total == 0)
		return walstream_fail(stream, WAL_ZERO_LENGTH, "record of length 0", stream->record_lsn);
	if (total < WAL_RECORD_HEADER || total > WAL_MAX_RECORD)
		return walstream_fail(stream, WAL_INVALID, "record of an impossible length", stream->record_lsn);
	stream->record_len = total;
	return 0;
}

/* Consume bytes of a record, at most to the end of its header or of the page; number consumed, or -1. */
static int64_t
take_record(WalStream *stream, const uint8_t *data, size_t len)
{
	uint32_t	goal = stream->record_len;
	uint64_t	n;

	if (stream->record_have < sizeof(uint32_t))
		goal = sizeof(uint32_t);
	else if (stream->record_have < WAL_RECORD_HEADER)
		goal = WAL_RECORD_HEADER;
	n = min_u64(min_u64(len, WAL_PAGE_SIZE - stream->position % WAL_PAGE_SIZE), goal - stream->record_have);
	if (stream->record_have < WAL_RECORD_HEADER)
		memcpy(stream->record_header + stream->record_have, data, n);
	else if (stream->verify_crc)
		stream->crc = crc32c_extend(stream->crc, data, n);
	stream->record_have += (uint32_t) n;
	if (stream->sink->bytes(stream, stream->owner, data, n) < 0)
		return -1;
	advance(stream, n);
	if (stream->record_have == sizeof(uint32_t) && learn_length(stream) < 0)
		return -1;
	if (stream->record_have == stream->record_len && finish_record(stream) < 0)
		return -1;
	return (int64_t) n;
}

/*
 * Most records are here in full and on one page: they are taken in one step, with the padding behind them.  0 when this one is
 * not like that, or is no record: then the other way finds out which.
 */
static int64_t
take_whole_record(WalStream *stream, const uint8_t *data, uint64_t in_page)
{
	uint32_t	total;
	uint64_t	padding;

	if (in_page < WAL_RECORD_HEADER)
		return 0;
	total = get_u32(data);
	if (total < WAL_RECORD_HEADER || total > in_page)
		return 0;
	if (begin_record(stream) < 0)
		return -1;
	memcpy(stream->record_header, data, WAL_RECORD_HEADER);
	stream->record_len = stream->record_have = total;
	if (stream->verify_crc)
		stream->crc = crc32c_extend(stream->crc, data + WAL_RECORD_HEADER, total - WAL_RECORD_HEADER);
	if (stream->sink->bytes(stream, stream->owner, data, total) < 0)
		return -1;
	advance(stream, total);
	if (finish_record(stream) < 0)
		return -1;
	padding = min_u64(align8(stream->position) - stream->position, in_page - total);
	if (padding != 0)
		advance(stream, padding);
	return (int64_t) (total + padding);
}

/* One step inside a page: tail of an old record, padding, or record bytes; number consumed, or -1. */
static int64_t
take_body(WalStream *stream, const uint8_t *data, size_t len)
{
	uint64_t	in_page = min_u64(len, WAL_PAGE_SIZE - stream->position % WAL_PAGE_SIZE);
	uint64_t	n;
	int64_t		taken;

	if (stream->tail_left != 0)
	{
		n = min_u64(in_page, stream->tail_left);
		stream->tail_left -= (uint32_t) n;
		advance(stream, n);
		if (stream->tail_left == 0)
			stream->resync = false;
		return (int64_t) n;
	}
	if (stream->in_record)
		return take_record(stream, data, len);
	n = align8(stream->position) - stream->position;
	if (n != 0)
	{
		n = min_u64(in_page, n);
		advance(stream, n);
		return (int64_t) n;
	}
	taken = take_whole_record(stream, data, in_page);
	if (taken != 0)
		return taken;
	if (begin_record(stream) < 0)
		return -1;
	return take_record(stream, data, len);
}

/*
 * Consume all of the chunk.  0, or -1 with stop and error set: position is then
 * somewhere after the bad bytes and the stream cannot go on.
 */
int
walstream_feed(WalStream *stream, const uint8_t *data, size_t len)
{
	if (stream->stop != WAL_GOING)
		return -1;
	while (len > 0)
	{
		int64_t		n;

		if (stream->position < stream->skip_to)
			n = skip_switched(stream, len);
		else if (stream->need_page_header)
			n = take_page_header(stream, data, len);
		else
			n = take_body(stream, data, len);
		if (n < 0)
			return -1;
		data += n;
		len -= (size_t) n;
	}
	return 0;
}
