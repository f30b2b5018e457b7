/*
 * What the parts of lane_fuzz share; main.c says what it is.
 *
 * Functions are described where they are.
 */
#ifndef LANE_FUZZ_H
#define LANE_FUZZ_H

#include "append_lane.h"
#include "proposer_lane.h"
#include "waldec.h"

#define GENERATION 7
#define TERM 5

/* --- support.c: small things ---------------------------------------------------------------------------------------------- */

/* What has happened so far: a run in which something of it never does proves nothing. */
typedef struct Seen
{
	unsigned long appends,
				commits,
				failed_writes,
				not_wal,
				answers_unsent,
				wal_taken,
				answers_taken,
				statuses,
				sends_cut,
				rings_round,
				gathered,
				left_to_python;
} Seen;

extern Seen seen;
extern unsigned long seed;
extern unsigned long input;		/* its number */
extern uint64_t random_state;	/* main() sets it anew for each input */
extern uint64_t clock_ns;		/* as clock_gettime() told it last */

typedef struct Bytes
{
	uint8_t    *at;
	size_t		size;
	size_t		room;
} Bytes;

#define U(value) ((uint64_t) (value))

extern uint32_t next_random(void);
extern uint32_t below(size_t limit);
extern bool one_in(uint32_t chances);
extern size_t some(size_t most);
extern void require(bool condition, const char *what);

extern uint8_t *allocate(size_t count);
extern uint8_t *grow(Bytes *bytes, size_t count);
extern void add(Bytes *bytes, const void *data, size_t count);
extern void drop(Bytes *bytes, size_t count);
extern void release(Bytes *bytes);

extern uint64_t number(const uint8_t *at, int bytes);
extern void add_fields(Bytes *bytes, ...);
extern size_t whole_message(const uint8_t *bytes, size_t count);
extern void mutate(uint8_t *data, size_t size);
extern uint64_t max_u64(uint64_t a, uint64_t b);
extern uint64_t min_u64(uint64_t a, uint64_t b);

/* --- links.c: sockets, and Python's side of a connection ------------------------------------------------------------------ */

typedef struct Link
{
	Lane	   *lane;
	LaneResult	(*readable) (Lane *lane);	/* the one under test */
	int			fd;				/* of the lane */
	int			peer;
	int			epoll_fd;
	bool		paused;
	Bytes		queue;			/* Python has to send it */
	Bytes		held;			/* Python has received it and not used it yet */
	uint64_t	received;		/* by the lane, or by Python */
} Link;

#define MOST_LINKS (PROPOSER_MEMBERS + 1)

/* All that were opened since link_count was set to 0, as each run does when it begins. */
extern Link *links[MOST_LINKS];
extern int	link_count;

extern void open_link(Link *link, LaneLoop *loop, int epoll_fd, Lane *lane, LaneResult (*readable) (Lane *),
					  void (*due) (Lane *, int64_t), size_t buffer_bytes);
extern void detach_link(Link *link);
extern void close_link(Link *link);
extern void watch(Link *link);

extern size_t send_some(int fd, const uint8_t *data, size_t count);
extern size_t receive_some(int fd, Bytes *into, size_t most);
extern void flush_queue(Link *link);
extern void python_write(Link *link, const uint8_t *data, size_t count);
extern void python_receives(Link *link, size_t most);
extern void count_and_hand_over(Link *link);

extern int	wait_for_events(LaneLoop *loop, LaneEvent *found, int most);
extern int	touched_lanes(LaneLoop *loop, Lane **touched, int most);

/* --- quorum.c: what a proposer's runs need of it, too --------------------------------------------------------------------- */

extern uint64_t sorted_quorum_lsn(const ProposerLane *proposer, const uint64_t *flush_lsns);
extern ProposerMember *member_at(uint32_t slot);
extern void choose_voters(ProposerLane *proposer, bool all);

/* --- the inputs: each function is one ------------------------------------------------------------------------------------- */

/* Of a corpus file. */
typedef struct Wal
{
	uint64_t	start_lsn;
	uint32_t	segment_size;
	uint8_t    *bytes;
	size_t		size;			/* of which all is valid */
} Wal;

extern void fuzz_take(const Wal *wal);	/* appends.c */
extern void fuzz_append_lane(const Wal *wal);	/* appends.c */
extern void fuzz_proposer(void);	/* proposer.c */
extern void fuzz_quorum(void);	/* quorum.c */
extern void fuzz_wait(void);	/* wait.c */

#endif
