/* Where the fields of the messages of a commit are; all numbers are big-endian. */
#ifndef NEON_LANE_MESSAGES_H
#define NEON_LANE_MESSAGES_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define COPY_DATA 'd'
#define FRAME_HEAD 5			/* a message's tag and length */

#define APPEND 'a'				/* an AppendRequest's kind, and an AppendResponse's */
#define APPEND_FRAME 50			/* CopyData's head, and an AppendRequest in front of its WAL */
#define APPEND_MOST_BYTES (128 * 1024)	/* of WAL in an AppendRequest */
#define APPEND_ANSWER 58		/* CopyData with an AppendResponse without pageserver feedback */

/* Offsets in a framed AppendRequest */
enum
{
	AT_LENGTH = 1,
	AT_KIND = 5,
	AT_GENERATION = 6,
	AT_TERM = 10,
	AT_BEGIN = 18,
	AT_END = 26,
	AT_COMMIT = 34,
	AT_TRUNCATE = 42
};

/* Offsets in a framed AppendResponse, where they are others: its head is the same up to the term */
enum
{
	ANSWER_FLUSH = 18,
	ANSWER_COMMIT = 26,
	ANSWER_STANDBY = 34
};

/* Whether these bytes, of which more may come, can be CopyData with a message of this kind. */
static inline bool
may_be_copy_data(const uint8_t *bytes, size_t count, uint8_t kind)
{
	return (count == 0 || bytes[0] == COPY_DATA) && (count <= FRAME_HEAD || bytes[FRAME_HEAD] == kind);
}

_Static_assert(AT_TRUNCATE + 8 == APPEND_FRAME, "the layout of a framed append");

#endif
