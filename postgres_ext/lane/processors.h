/* Whether this machine is short of processors. */
#ifndef NEON_PROCESSORS_H
#define NEON_PROCESSORS_H

#include <stdbool.h>
#include <stdint.h>

/* Mirrored in Python, as the structures of lane.h. */
typedef struct Processors
{
	int64_t		looked_ns;		/* when the statistics were read last; 0: never */
	uint64_t	all_ticks;		/* what they said then: the time of all processors, and how much of it was idle */
	uint64_t	idle_ticks;
	int32_t		statistics;		/* /proc/stat, open; -1: nothing is known, and processors count as not short */
	uint32_t	are_short;		/* they were hardly ever idle of late */
} Processors;

extern bool processors_are_short(Processors *processors, int64_t now_ns);

#endif
