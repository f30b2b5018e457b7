/*
 * Lanes: what every commit waits for, done while the event loop waits, without a step of Python.
 *
 * A lane is one connection for which C code takes the messages that need nothing but what the lane was given.  Everything else
 * it leaves to Python, byte for byte.  Invariant: Python and lanes never run at the same time.  A lane works on a copy of the
 * state that Python lent it (`open`); what it did is told to Python before any Python code runs (lane_loop_touched()).
 *
 * All structures of this file are mirrored in Python with ctypes; lane_layout() lets it check that both mean the same.
 */
#ifndef NEON_LANE_H
#define NEON_LANE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef struct Lane Lane;
typedef struct LaneLoop LaneLoop;

typedef enum LaneResult
{
	LANE_TOOK = 0,				/* nothing is left but a message that is not here in full */
	LANE_LEAVES = 1				/* Python must look at the connection */
} LaneResult;

struct Lane
{
	LaneResult	(*readable) (Lane *lane);	/* bytes are there to be received */
	void		(*due) (Lane *lane, int64_t now_ns);	/* due_ns has come; it may be set anew.  Also while not open */
	LaneLoop   *loop;			/* NULL: not attached */
	uint8_t    *buffer;			/* what was received and not taken */
	uint64_t	size;
	uint64_t	filled;
	int64_t		due_ns;			/* CLOCK_MONOTONIC; 0: never */
	uint64_t	received;		/* bytes, since Python looked last */
	uint64_t	sent;
	int32_t		fd;
	uint32_t	open;			/* the state is lent: the lane may run */
	uint32_t	touched;		/* it differs from what was lent, or something is due: the loop lists the lane */
	uint32_t	wants;			/* Python must look at it now */
	uint32_t	leaves;			/* Python must take what is in the buffer, before it receives any more */
	uint32_t	pad;
};

typedef struct LaneEvent
{
	int32_t		fd;
	uint32_t	events;			/* as epoll's */
} LaneEvent;

/* the event loop's side, loop.c */
extern LaneLoop *lane_loop_new(int epoll_fd);
extern void lane_loop_free(LaneLoop *loop);
extern int	lane_loop_watch(LaneLoop *loop, int fd, uint32_t events);
extern int	lane_loop_attach(LaneLoop *loop, Lane *lane);
extern void lane_loop_detach(LaneLoop *loop, Lane *lane);
extern int	lane_loop_wait(LaneLoop *loop, int64_t timeout_ns, LaneEvent *found, int most);
extern int	lane_loop_touched(LaneLoop *loop, Lane **touched, int most);

/* for lanes */
extern int64_t lane_now_ns(void);
extern void lane_touch(Lane *lane);
extern bool lane_sends_directly(const Lane *lane);
extern bool lane_receive(Lane *lane);
extern void lane_drop(Lane *lane, size_t taken);
extern size_t lane_send(Lane *lane, const void *head, size_t head_bytes, const void *data, size_t data_bytes,
						const void *more, size_t more_bytes);

extern const uint32_t *lane_layout(void);

/* Of two times the first; 0 is never. */
static inline int64_t
lane_earlier(int64_t one_ns, int64_t other_ns)
{
	return one_ns == 0 || (other_ns != 0 && other_ns < one_ns) ? other_ns : one_ns;
}

static inline uint32_t
lane_u32(const uint8_t *at)
{
	uint32_t	value;

	__builtin_memcpy(&value, at, sizeof(value));
	return __builtin_bswap32(value);
}

static inline uint64_t
lane_u64(const uint8_t *at)
{
	uint64_t	value;

	__builtin_memcpy(&value, at, sizeof(value));
	return __builtin_bswap64(value);
}

static inline void
lane_put_u32(uint8_t *at, uint32_t value)
{
	value = __builtin_bswap32(value);
	__builtin_memcpy(at, &value, sizeof(value));
}

static inline void
lane_put_u64(uint8_t *at, uint64_t value)
{
	value = __builtin_bswap64(value);
	__builtin_memcpy(at, &value, sizeof(value));
}

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "lanes are for little-endian machines, as the whole project is");

#endif
