/* A safekeeper's lane: appends of the leader that streams. */
#ifndef NEON_APPEND_LANE_H
#define NEON_APPEND_LANE_H

#include <sys/types.h>
#include <sys/uio.h>

#include "lane.h"
#include "messages.h"
#include "walstream.h"

#define APPEND_WRITES 1024

typedef enum AppendError
{
	APPEND_FINE = 0,
	APPEND_NOT_WAL = -1			/* the scanner says why; a positive number is the errno of a failed write */
} AppendError;

/* Writes all pieces durably at the offset; 0, or an errno. */
typedef int (*AppendWriter) (int fd, const struct iovec *pieces, int count, int64_t offset, int flags);

typedef struct AppendLane
{
	Lane		lane;
	AppendWriter writer;		/* NULL: the file system's */
	WalStream  *scanner;
	uint64_t	term;
	uint64_t	segment_lsn;	/* where the open segment begins */
	uint64_t	plain_end;		/* up to here nothing but a write is needed; 0: the lane is shut */
	uint64_t	write_lsn;
	uint64_t	flush_lsn;
	uint64_t	timeline_start_lsn; /* no answer is below it */
	uint64_t	commit_lsn;		/* the highest that the appends told; 0: none */
	uint64_t	truncate_lsn;
	int64_t		tell_ns;		/* Python tells others at most so often; 0: of each append */
	int64_t		told_ns;		/* when it was asked to last */
	uint64_t	early_bytes;	/* so much is given to the disk while the rest is checked; 0: never */
	uint64_t	appends;		/* taken since Python looked last */
	uint32_t	generation;
	int32_t		file;
	int32_t		flags;			/* of the write: RWF_DSYNC */
	int32_t		error;			/* AppendError or an errno: nothing is taken any more */
	uint32_t	unsent;			/* bytes of the answer's end that the socket did not take */
	uint32_t	writes;
	uint64_t	sizes[APPEND_WRITES];	/* of the writes since Python looked last */
	int64_t		took_ns[APPEND_WRITES];
	uint8_t		answer[APPEND_ANSWER];	/* the last one; but for its flush_lsn as Python made it */
} AppendLane;

extern size_t append_lane_take(AppendLane *lane, const uint8_t *bytes, size_t count);
extern LaneResult append_lane_readable(Lane *lane);
extern void append_lane_due(Lane *lane, int64_t now_ns);

#endif
