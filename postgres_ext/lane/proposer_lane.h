/* The walproposer's lanes: WAL from Postgres to the safekeepers, and their acknowledgements back to Postgres. */
#ifndef NEON_PROPOSER_LANE_H
#define NEON_PROPOSER_LANE_H

#include "lane.h"
#include "messages.h"
#include "processors.h"

#define PROPOSER_MEMBERS 16
#define PROPOSER_STANDBY_BYTES 24
#define PROPOSER_STATUS_BYTES 39

typedef struct ProposerLane ProposerLane;

typedef enum MemberMode
{
	MEMBER_CLOSED = 0,			/* nothing is sent to it */
	MEMBER_DIRECT = 1,			/* the lane sends */
	MEMBER_PYTHON = 2			/* Python sends: a donor feeds it, it lags behind the ring, or bytes are queued for it */
} MemberMode;

typedef struct ProposerMember
{
	Lane		lane;
	ProposerLane *proposer;
	uint64_t	sent_lsn;
	uint64_t	flush_lsn;
	uint64_t	told_commit_lsn;
	uint64_t	persisted_commit_lsn;
	int64_t		last_sent_ns;
	int64_t		sent_at_ns;		/* of the append that is awaited */
	double		answer_s;		/* smoothed time from append to answer */
	uint32_t	slot;
	uint32_t	voter;			/* bit 0: of the first set of voters; bit 1: of the second */
	uint32_t	mode;
	uint32_t	active;			/* its acknowledgements are expected */
	uint32_t	awaiting;
	uint32_t	heard;
	uint32_t	unsent;			/* bytes at the end of `message` that the socket did not take */
	uint32_t	message_bytes;
	uint8_t		standby[PROPOSER_STANDBY_BYTES];	/* the replicas' feedback that it told last */
	uint8_t		message[APPEND_FRAME + APPEND_MOST_BYTES + 2];	/* the append that did not go in full */
} ProposerMember;

struct ProposerLane
{
	Lane		lane;			/* Postgres's connection */
	uint8_t    *ring;
	uint64_t	ring_size;
	uint64_t	ring_start;		/* the oldest position held when the ring was lent */
	uint64_t	ring_end;
	uint64_t	room_bytes;		/* of WAL that is not committed: then Python looks whether to stop reading */
	uint64_t	term;
	uint64_t	term_start_lsn;
	uint64_t	commit_lsn;
	uint64_t	truncate_lsn;
	uint64_t	statuses;		/* sent to Postgres since Python looked last */
	uint64_t	applied_lsn;	/* what pageservers have; UINT64_MAX when none has told */
	int64_t		postgres_epoch_us;	/* of CLOCK_REALTIME */
	int64_t		lazy_ns;
	uint64_t	lazy_bytes;		/* at most so much waits for lazy_ns */
	int64_t		lazy_due_ns;
	int64_t		broadcast_ns;
	int64_t		broadcast_due_ns;
	int64_t		commit_moved_ns;
	int64_t		gather_ns;		/* for so long after an append what came meanwhile may wait, if processors are short */
	int64_t		gather_due_ns;
	Processors	processors;
	uint32_t	generation;
	uint32_t	members;
	uint32_t	lazy;			/* the member that is fed late; `members` for none */
	uint32_t	voters[2];		/* size of each set; 0: there is no second */
	uint32_t	pump;			/* bit per member that Python has to feed */
	uint32_t	status_due;		/* Python has to send Postgres the status */
	uint32_t	broadcast_due;	/* Python has to tell commit_lsn to those who were not told */
	uint32_t	paused;			/* reading from Postgres is stopped: Python looks when commit_lsn moves */
	uint32_t	unsent;			/* bytes at the end of `status` that the socket did not take */
	uint8_t		status[PROPOSER_STATUS_BYTES];	/* the last one */
	uint8_t		pad;
	ProposerMember *member[PROPOSER_MEMBERS];
};

extern uint64_t proposer_lane_quorum_lsn(const ProposerLane *proposer);
extern size_t proposer_lane_take_wal(ProposerLane *proposer, const uint8_t *bytes, size_t count);
extern size_t proposer_lane_take_answers(ProposerMember *member, const uint8_t *bytes, size_t count);
extern void proposer_lane_arm(ProposerLane *proposer, int64_t lazy_due_ns, int64_t broadcast_due_ns);
extern LaneResult proposer_lane_postgres_readable(Lane *lane);
extern LaneResult proposer_lane_member_readable(Lane *lane);
extern void proposer_lane_due(Lane *lane, int64_t now_ns);

#endif
