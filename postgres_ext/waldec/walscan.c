/*
 * The record scanner of safekeepers: where do records end?  Nothing is copied
 * and nothing is allocated per record; the CRC is carried from chunk to chunk.
 */
#include <stdlib.h>

#include "waldec.h"
#include "walstream.h"

static int
ignore_begin(WalStream *stream, void *owner)
{
	(void) stream;
	(void) owner;
	return 0;
}

static int
ignore_bytes(WalStream *stream, void *owner, const uint8_t *data, size_t len)
{
	(void) stream;
	(void) owner;
	(void) data;
	(void) len;
	return 0;
}

static int
ignore_end(WalStream *stream, void *owner, uint64_t end_lsn)
{
	(void) stream;
	(void) owner;
	(void) end_lsn;
	return 0;
}

static void
ignore_abandon(WalStream *stream, void *owner)
{
	(void) stream;
	(void) owner;
}

static const WalSink scan_sink = {ignore_begin, ignore_bytes, ignore_end, ignore_abandon};

/* NULL when out of memory, or when no segment has this size. */
WalStream *
walscan_new(uint64_t start_lsn, uint32_t segment_size)
{
	WalStream  *stream;

	if (!walstream_segment_size_is_possible(segment_size))
		return NULL;
	stream = calloc(1, sizeof(WalStream));
	if (stream == NULL)
		return NULL;
	stream->sink = &scan_sink;
	stream->segment_size = segment_size;
	stream->verify_crc = true;
	walstream_start(stream, start_lsn);
	return stream;
}

void
walscan_free(WalStream *stream)
{
	free(stream);
}

/* 0, or a WalStop number: the text is in walscan_error(). */
int
walscan_feed(WalStream *stream, const uint8_t *data, size_t len)
{
	return walstream_feed(stream, data, len) < 0 ? (int) stream->stop : 0;
}

const char *
walscan_error(const WalStream *stream)
{
	return stream->error;
}
