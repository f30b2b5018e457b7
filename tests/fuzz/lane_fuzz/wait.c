/*
 * A wait's end: it checks that lane_loop_wait() returns in time while a lane has always something to do.
 */
#include <sys/epoll.h>
#include <unistd.h>

#include "lane_fuzz.h"

static int	busy_peer;
static int	busy_runs;

/* Takes what is there, and there is more at once. */
static LaneResult
busy_readable(Lane *lane)
{
	require(lane_receive(lane), "nothing was received");
	lane_drop(lane, lane->filled);
	busy_runs++;
	if (busy_runs < 100000)
		require(send_some(busy_peer, (const uint8_t *) "x", 1) == 1, "a socket failed");
	return LANE_TOOK;
}

/* Python's timers must come to their turn, however busy the lanes are. */
void
fuzz_wait(void)
{
	static Lane lane;
	int			epoll_fd = epoll_create1(0);
	LaneLoop   *loop = lane_loop_new(epoll_fd);
	LaneEvent	found[4];
	Link		link;
	uint64_t	timeout_ns = 1 + below(3000000);
	uint64_t	until_ns;

	require(epoll_fd >= 0 && loop != NULL, "no event loop");
	lane = (Lane)
	{
		.open = 1
	};
	link_count = 0;
	open_link(&link, loop, epoll_fd, &lane, busy_readable, NULL, 100);
	busy_peer = link.peer;
	busy_runs = 0;
	require(send_some(busy_peer, (const uint8_t *) "x", 1) == 1, "a socket failed");
	until_ns = clock_ns + timeout_ns;
	require(lane_loop_wait(loop, (int64_t) timeout_ns, found, 4) == 0, "an event of which nothing was left");
	/* our clock makes steps of up to 40 us, and the loop looks at it a few times in each round */
	require(clock_ns >= until_ns && clock_ns < until_ns + 1000000, "a wait ends only when the lanes have nothing to do");
	close_link(&link);
	lane_loop_free(loop);
	(void) close(epoll_fd);
}
