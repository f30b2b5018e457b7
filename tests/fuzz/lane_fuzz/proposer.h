/*
 * What the parts of a proposer's run share: proposer.c, proposer_peers.c and proposer_python.c.
 */
#ifndef LANE_FUZZ_PROPOSER_H
#define LANE_FUZZ_PROPOSER_H

#include "lane_fuzz.h"

#define XLOG_HEAD 30
#define ANSWER_BYTES 58
#define STATUS_BYTES 39
#define MOST_MEMBERS 5
#define FULL_QUEUE 65536		/* then nothing more is written to a member */

/* What one side sends to a lane: what it is made of, and how far it is what the lane may use. */
typedef struct Sent
{
	Bytes		wire;
	size_t		sent;			/* the socket has them */
	size_t		parsed;			/* whole messages that make sense */
	size_t		used;			/* lane or Python have taken so many; kept for answers only */
	bool		broken;			/* what comes at `parsed` makes none */
	bool		mutated;
} Sent;

typedef struct Safekeeper
{
	ProposerMember *member;
	uint64_t	lent_sent_lsn;
	uint64_t	lent_flush_lsn;
	Link		link;
	Sent		answers;
	Bytes		appends;		/* received, not looked at */
	uint64_t	received_lsn;
	uint64_t	flush_lsn;		/* as told last */
	uint64_t	claimed_lsn;	/* the highest that an answer told which was taken */
	uint8_t		standby[PROPOSER_STANDBY_BYTES];
	bool		asked;
	bool		full;
} Safekeeper;

typedef struct Proposal
{
	ProposerLane proposer;
	LaneLoop   *loop;
	int			epoll_fd;
	Link		postgres;
	Sent		xlog;
	uint64_t	next_lsn;		/* Postgres sends it next */
	uint64_t	end_lsn;		/* there is no more WAL */
	uint64_t	model_end_lsn;	/* what was parsed of it reaches so far */
	uint64_t	first_lsn;		/* the ring began there */
	uint64_t	reference_lsn;
	Bytes		reference;		/* WAL as it was sent, from reference_lsn on */
	Bytes		statuses;
	int			statistics;		/* takes the place of /proc/stat */
	uint64_t	ticks[8];		/* what it says */
	bool		strange;		/* it says something else, that was mutated */
	bool		gave_up;		/* the proposer looks no more */
	int64_t		looked_ns;		/* when the proposer looked at it last, and what it saw */
	uint64_t	looked_all;
	uint64_t	looked_idle;
	bool		crowded;
	int64_t		gather_due_ns;	/* as it was after the last wait */
	int64_t		waits_ns;		/* since when */
	uint64_t	told_lsn;
	Safekeeper	safekeepers[MOST_MEMBERS];
	bool		mutates;
	size_t		buffer_bytes;	/* of Postgres's lane */
	size_t		most_wal;		/* in one of Postgres's messages */
	uint64_t	reserve_bytes;	/* what the ring holds besides the room */
	bool		slow;			/* Postgres and safekeepers read seldom */
	int			idle;			/* rounds without progress */
	bool		progress;
} Proposal;

/* - proposer_peers.c: Postgres and the safekeepers, and what the lanes may take of what they send */

extern bool is_broken(Sent *sent);
extern bool is_answer(const uint8_t *at, size_t size);
extern void answers_used(const Proposal *run, Safekeeper *keeper, size_t end);
extern void lose_wire(Sent *sent, Link *link);
extern void postgres_sends(Proposal *run);
extern void postgres_reads(Proposal *run);
extern void safekeeper_reads(Proposal *run, Safekeeper *keeper);
extern void safekeeper_answers(Proposal *run, Safekeeper *keeper);

/* - proposer_python.c: what Python does */

extern void python_append(Proposal *run, Safekeeper *keeper, size_t size);
extern void python_pump(Proposal *run, Safekeeper *keeper);
extern void python_check_room(Proposal *run);
extern void python_takes_wal(Proposal *run);
extern void python_takes_answers(Proposal *run, Safekeeper *keeper);
extern void python_reads(Proposal *run, const LaneEvent *found, int count);
extern uint64_t ring_start(const Proposal *run);
extern void lend(Proposal *run);
extern void attend(Proposal *run);

#endif
