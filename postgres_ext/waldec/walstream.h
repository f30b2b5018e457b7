/*
 * The WAL byte stream as a push parser: any chunking in, whole records out.
 *
 * This layer knows pages, page headers, record boundaries and record CRCs, and
 * nothing of what is inside a record, so it serves every Postgres major.  The
 * owner gives a table of callbacks; each may fail by returning -1 after
 * walstream_fail().
 *
 * Legal start points: the start of a record, of a page, or of a segment.  When
 * a page opens with the tail of a record that began earlier, the tail is
 * skipped.
 */
#ifndef NEON_WALSTREAM_H
#define NEON_WALSTREAM_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define WAL_PAGE_SIZE 8192
#define WAL_SHORT_HEADER 24
#define WAL_LONG_HEADER 40
#define WAL_RECORD_HEADER 24
#define WAL_MAX_RECORD (UINT32_C(1020) * 1024 * 1024)

/* Why the stream stopped.  Kept as numbers in the Python binding. */
typedef enum WalStop
{
	WAL_GOING = 0,
	WAL_ZERO_LENGTH = 1,		/* a record length of 0: nothing was written here */
	WAL_ZERO_PAGE = 2,			/* a page of zeros */
	WAL_STALE_PAGE = 3,			/* the page of an older use of this file */
	WAL_INVALID = 4,			/* anything else: damage */
	WAL_NO_MEMORY = 5
} WalStop;

typedef struct WalStream WalStream;

typedef struct WalSink
{
	/* a record begins at stream->record_lsn */
	int			(*begin) (WalStream *stream, void *owner);
	/* its next bytes, page headers removed */
	int			(*bytes) (WalStream *stream, void *owner, const uint8_t *data, size_t len);
	/* it is complete and its CRC is right; end_lsn is what redo calls EndRecPtr */
	int			(*end) (WalStream *stream, void *owner, uint64_t end_lsn);
	/* it will never be completed (the writer crashed and began anew) */
	void		(*abandon) (WalStream *stream, void *owner);
} WalSink;

struct WalStream
{
	uint64_t	position;		/* LSN of the next input byte */
	uint64_t	record_end_lsn; /* end of the last complete record; never above position */

	const WalSink *sink;
	void	   *owner;
	uint32_t	segment_size;
	uint16_t	magic;			/* the only page magic accepted; 0: any known one */
	bool		verify_crc;

	uint64_t	pending_end;	/* end of a complete record whose padding is not consumed yet; 0: none */
	uint64_t	skip_to;		/* input before this LSN is the rest of a switched segment */

	uint8_t		page_header[WAL_LONG_HEADER];
	uint32_t	page_header_have;
	bool		need_page_header;

	bool		resync;			/* no record seen yet: a leading tail may be skipped */
	uint32_t	tail_left;		/* bytes of that tail on this page and the next ones */

	bool		in_record;
	uint64_t	record_lsn;
	uint32_t	record_len;		/* xl_tot_len; 0 until known */
	uint32_t	record_have;
	uint32_t	crc;			/* of the bytes after the header, so far */
	uint8_t		record_header[WAL_RECORD_HEADER];

	WalStop		stop;
	char		error[192];
};

extern bool walstream_segment_size_is_possible(uint32_t segment_size);
extern void walstream_start(WalStream *stream, uint64_t lsn);
extern int	walstream_feed(WalStream *stream, const uint8_t *data, size_t len);
extern int	walstream_fail(WalStream *stream, WalStop stop, const char *what, uint64_t lsn);

#endif
