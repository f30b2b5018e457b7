/*
 * Whether this machine is short of processors, by the kernel's statistics.
 *
 * They begin with "cpu" and the ticks, hundredths of a second, of user, nice, system, idle, iowait, irq, softirq and steal.  A
 * processor whose tasks wait for a disk is idle.
 */
#include "processors.h"

#include <string.h>
#include <unistd.h>

#define LOOK_NS INT64_C(250000000)	/* in less time the ticks would say little */
#define FIELDS 8
#define IDLE 3
#define IOWAIT 4
#define IDLE_PART 10			/* processors are short when they are idle for less than one part of so many */

/* The next number of this text, or -1 when there is none. */
static int64_t
take_number(const char **text)
{
	int64_t		value = 0;

	while (**text == ' ')
		(*text)++;
	if (**text < '0' || **text > '9')
		return -1;
	for (; **text >= '0' && **text <= '9'; (*text)++)
		value = (int64_t) ((uint64_t) value * 10 + (uint64_t) (**text - '0')) & INT64_MAX;
	return value;
}

/* False when they are not what they should be. */
static bool
read_statistics(int file, uint64_t *all_ticks, uint64_t *idle_ticks)
{
	char		text[256];
	const char *at = text + 3;
	ssize_t		size = pread(file, text, sizeof(text) - 1, 0);

	text[size > 0 ? size : 0] = 0;
	if (strncmp(text, "cpu ", 4) != 0)
		return false;
	*all_ticks = *idle_ticks = 0;
	for (int field = 0; field < FIELDS; field++)
	{
		int64_t		ticks = take_number(&at);

		if (ticks < 0)
			return false;
		*all_ticks += (uint64_t) ticks;
		if (field == IDLE || field == IOWAIT)
			*idle_ticks += (uint64_t) ticks;
	}
	return true;
}

/* Whether they were hardly ever idle between the last two looks; looks again when the last one is a while ago. */
bool
processors_are_short(Processors *processors, int64_t now_ns)
{
	uint64_t	all_ticks,
				idle_ticks;

	if (processors->statistics < 0 || now_ns - processors->looked_ns < LOOK_NS)
		return processors->are_short;
	if (!read_statistics(processors->statistics, &all_ticks, &idle_ticks))
	{
		processors->statistics = -1;	/* never again */
		processors->are_short = 0;
		return false;
	}
	processors->are_short = processors->looked_ns != 0 &&
		(idle_ticks - processors->idle_ticks) * IDLE_PART < all_ticks - processors->all_ticks;
	processors->all_ticks = all_ticks;
	processors->idle_ticks = idle_ticks;
	processors->looked_ns = now_ns;
	return processors->are_short;
}
