/*
 * What a quorum has: it checks proposer_lane_quorum_lsn() against sorting, for random voters.
 */
#include <stdlib.h>
#include <string.h>

#include "lane_fuzz.h"

static int
compare_lsn(const void *a, const void *b)
{
	uint64_t	left,
				right;

	memcpy(&left, a, sizeof(left));
	memcpy(&right, b, sizeof(right));
	return left < right ? -1 : left > right;
}

/* As membership.quorum_lsn(): of each set the position that its quorum has, by sorting. */
uint64_t
sorted_quorum_lsn(const ProposerLane *proposer, const uint64_t *flush_lsns)
{
	uint64_t	lowest = UINT64_MAX;

	for (int set = 0; set < 2; set++)
	{
		uint64_t	ranked[2 * PROPOSER_MEMBERS] = {0};	/* voters that are not in the list have nothing */
		uint32_t	count = proposer->voters[set];
		uint32_t	known = 0;
		uint64_t	reached;

		if (count == 0)
		{
			if (set == 0)
				return 0;
			continue;
		}
		for (uint32_t i = 0; i < proposer->members; i++)
			if (proposer->member[i]->voter & UINT32_C(1) << set)
				ranked[known++] = flush_lsns[i];
		qsort(ranked, count, sizeof(uint64_t), compare_lsn);
		reached = ranked[count - (count / 2 + 1)];
		if (reached < proposer->term_start_lsn)
			return 0;
		lowest = min_u64(lowest, reached);
	}
	return lowest;
}

ProposerMember *
member_at(uint32_t slot)
{
	static ProposerMember *members[PROPOSER_MEMBERS];

	if (members[slot] == NULL)
		members[slot] = (ProposerMember *) (void *) allocate(sizeof(ProposerMember));
	memset(members[slot], 0, offsetof(ProposerMember, message));
	return members[slot];
}

/* Who votes, and how many voters there are: some may be none of the list's. */
void
choose_voters(ProposerLane *proposer, bool all)
{
	proposer->voters[0] = proposer->voters[1] = 0;
	for (uint32_t i = 0; i < proposer->members; i++)
		proposer->member[i]->voter = 0;
	for (uint32_t set = 0; set < 1 + (uint32_t) one_in(3); set++)
	{
		for (uint32_t i = 0; i < proposer->members; i++)
			if (all || !one_in(4))
			{
				proposer->member[i]->voter |= UINT32_C(1) << set;
				proposer->voters[set]++;
			}
		if (one_in(3) && proposer->voters[set] > 2)
			proposer->voters[set] += 1 + (all ? 0 : below(4));
	}
	if (proposer->voters[0] == 0)
	{
		proposer->voters[0] = 1;	/* at least one, not in the list */
		if (all)
			proposer->member[0]->voter |= 1;
	}
}

void
fuzz_quorum(void)
{
	static ProposerLane proposer;

	proposer = (ProposerLane)
	{
		.members = 1 + below(PROPOSER_MEMBERS)
	};
	for (uint32_t i = 0; i < proposer.members; i++)
		proposer.member[i] = member_at(i);
	for (int round = 0; round < 200; round++)
	{
		uint64_t	base = one_in(4) ? 0 : one_in(3) ? UINT64_MAX - 20 : UINT64_C(0x7FFFFFF0);
		uint64_t	flush_lsns[PROPOSER_MEMBERS];

		choose_voters(&proposer, false);
		if (one_in(30))
			proposer.voters[0] = 0;
		for (uint32_t i = 0; i < proposer.members; i++)
			flush_lsns[i] = proposer.member[i]->flush_lsn = one_in(6) ? 0 : base + below(20);
		proposer.term_start_lsn = base + (one_in(2) ? 0 : below(20));
		require(proposer_lane_quorum_lsn(&proposer) == sorted_quorum_lsn(&proposer, flush_lsns),
				"another quorum than sorting finds");
	}
}
