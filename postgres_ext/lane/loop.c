/*
 * The event loop's wait: epoll, and the lanes that run inside of it.
 *
 * Invariant: an event reaches a lane only when it is one of reading alone and Python waits for nothing else on that connection
 * (waiting for room to write means that Python has bytes queued, which go first); all other events are Python's.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <time.h>

#include "append_lane.h"
#include "lane.h"
#include "proposer_lane.h"

#define MOST_EVENTS 256
#define NS_PER_MS INT64_C(1000000)
#define NS_PER_S INT64_C(1000000000)
#define LONGEST_NS (1000 * NS_PER_S)

typedef struct Watched
{
	uint32_t	events;			/* what Python waits for */
	Lane	   *lane;
} Watched;

struct LaneLoop
{
	int			epoll_fd;
	int			fds;			/* length of `watched` */
	Watched    *watched;		/* by file descriptor */
	int			lanes;
	int			touched;
	int			room;			/* of both lists */
	Lane	  **attached;
	Lane	  **list;			/* of the touched ones */
};

/* The epoll set stays the caller's, who adds and removes descriptors; NULL when out of memory. */
LaneLoop *
lane_loop_new(int epoll_fd)
{
	LaneLoop   *loop = calloc(1, sizeof(LaneLoop));

	if (loop != NULL)
		loop->epoll_fd = epoll_fd;
	return loop;
}

void
lane_loop_free(LaneLoop *loop)
{
	for (int i = 0; i < loop->lanes; i++)
		loop->attached[i]->loop = NULL;
	free(loop->attached);
	free(loop->list);
	free(loop->watched);
	free(loop);
}

static int
know_fd(LaneLoop *loop, int fd)
{
	if (fd < 0)
	{
		errno = EBADF;
		return -1;
	}
	if (fd >= loop->fds)
	{
		int			fds = fd < 512 ? 1024 : fd * 2;
		Watched    *watched = realloc(loop->watched, (size_t) fds * sizeof(Watched));

		if (watched == NULL)
			return -1;
		memset(watched + loop->fds, 0, (size_t) (fds - loop->fds) * sizeof(Watched));
		loop->watched = watched;
		loop->fds = fds;
	}
	return 0;
}

/* What Python waits for on this descriptor; 0 for nothing any more.  -1 with errno. */
int
lane_loop_watch(LaneLoop *loop, int fd, uint32_t events)
{
	if (know_fd(loop, fd) != 0)
		return -1;
	loop->watched[fd].events = events;
	return 0;
}

/* The lane is its connection's from now on.  -1 with errno. */
int
lane_loop_attach(LaneLoop *loop, Lane *lane)
{
	if (know_fd(loop, lane->fd) != 0)
		return -1;
	if (loop->watched[lane->fd].lane != NULL || lane->loop != NULL)
	{
		errno = EEXIST;
		return -1;
	}
	if (loop->lanes == loop->room)
	{
		int			room = loop->room ? loop->room * 2 : 16;
		Lane	  **attached = realloc(loop->attached, (size_t) room * sizeof(Lane *));
		Lane	  **list = realloc(loop->list, (size_t) room * sizeof(Lane *));

		if (attached != NULL)
			loop->attached = attached;
		if (list != NULL)
			loop->list = list;
		if (attached == NULL || list == NULL)
			return -1;
		loop->room = room;
	}
	loop->attached[loop->lanes++] = lane;
	loop->watched[lane->fd].lane = lane;
	lane->loop = loop;
	lane->touched = 0;
	return 0;
}

static void
remove_from(Lane **list, int *count, const Lane *lane)
{
	for (int i = 0; i < *count; i++)
	{
		if (list[i] == lane)
		{
			list[i] = list[--*count];
			return;
		}
	}
}

void
lane_loop_detach(LaneLoop *loop, Lane *lane)
{
	if (lane->loop != loop)
		return;
	remove_from(loop->attached, &loop->lanes, lane);
	remove_from(loop->list, &loop->touched, lane);
	loop->watched[lane->fd].lane = NULL;
	lane->loop = NULL;
	lane->touched = 0;
}

/* Python has to be told about this lane, or something of it will be due. */
void
lane_touch(Lane *lane)
{
	if (!lane->touched && lane->loop != NULL)
	{
		lane->touched = 1;
		lane->loop->list[lane->loop->touched++] = lane;
	}
}

/* The lanes that were touched since the last call, at most so many; those of which something is due stay listed. */
int
lane_loop_touched(LaneLoop *loop, Lane **touched, int most)
{
	int			count = 0,
				kept = 0;

	for (int i = 0; i < loop->touched; i++)
	{
		Lane	   *lane = loop->list[i];

		if (count == most)
		{
			loop->list[kept++] = lane;
			continue;
		}
		touched[count++] = lane;
		if (lane->due_ns != 0)
			loop->list[kept++] = lane;
		else
			lane->touched = 0;
	}
	loop->touched = kept;
	return count;
}

int64_t
lane_now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (int64_t) now.tv_sec * NS_PER_S + now.tv_nsec;
}

/* The earliest time at which a lane is due; 0 for none. */
static int64_t
first_due(const LaneLoop *loop)
{
	int64_t		first = 0;

	for (int i = 0; i < loop->touched; i++)
		first = lane_earlier(first, loop->list[i]->due_ns);
	return first;
}

/* Run what is due; whether a lane wants Python to look. */
static bool
run_due(LaneLoop *loop)
{
	int64_t		now_ns = 0;
	bool		wanted = false;

	for (int i = 0; i < loop->touched; i++)
	{
		Lane	   *lane = loop->list[i];

		if (lane->due_ns != 0)
		{
			if (now_ns == 0)
				now_ns = lane_now_ns();
			if (lane->due_ns <= now_ns)
			{
				lane->due_ns = 0;
				lane->due(lane, now_ns);
			}
		}
		wanted |= lane->wants != 0;
	}
	return wanted;
}

/* How long to wait for events: negative for ever. */
static int64_t
wait_ns(int64_t until_ns, int64_t due_ns)
{
	int64_t		left_ns;

	if (due_ns != 0 && (until_ns < 0 || due_ns < until_ns))
		until_ns = due_ns;
	if (until_ns < 0)
		return -1;
	left_ns = until_ns - lane_now_ns();
	return left_ns < 0 ? 0 : left_ns > LONGEST_NS ? LONGEST_NS : left_ns;
}

/* As epoll_wait, with times in nanoseconds where the kernel has that and may be asked for it. */
static int
wait_for_events(int epoll_fd, struct epoll_event *events, int most, int64_t left_ns)
{
	static bool to_ms;

	if (left_ns > 0 && !to_ms)
	{
		struct timespec left = {left_ns / NS_PER_S, left_ns % NS_PER_S};
		int			ready = epoll_pwait2(epoll_fd, events, most, &left, NULL);

		if (ready >= 0 || (errno != ENOSYS && errno != EPERM))
			return ready;
		to_ms = true;
	}
	return epoll_wait(epoll_fd, events, most, left_ns < 0 ? -1 : (int) ((left_ns + NS_PER_MS - 1) / NS_PER_MS));
}

/*
 * Wait until something is there for Python or the time is over (negative: wait for ever), running lanes meanwhile.  The number
 * of events found; lanes that were touched, want Python or have bytes left say so themselves.  -1 with errno.
 */
int
lane_loop_wait(LaneLoop *loop, int64_t timeout_ns, LaneEvent *found, int most)
{
	struct epoll_event events[MOST_EVENTS];
	int64_t		until_ns = timeout_ns <= 0 ? timeout_ns : lane_now_ns() + timeout_ns;

	if (most > MOST_EVENTS)
		most = MOST_EVENTS;
	for (;;)
	{
		int64_t		left_ns = timeout_ns == 0 ? 0 : wait_ns(until_ns, first_due(loop));
		int			ready = wait_for_events(loop->epoll_fd, events, most, left_ns);
		int			count = 0;

		if (ready < 0)
			return errno == EINTR ? 0 : -1; /* Python has a signal to see to */
		for (int i = 0; i < ready; i++)
		{
			int			fd = events[i].data.fd;
			Watched    *watched = &loop->watched[fd];
			Lane	   *lane = watched->lane;

			if (lane != NULL && lane->open && events[i].events == EPOLLIN && watched->events == EPOLLIN &&
				lane->readable(lane) == LANE_TOOK)
				continue;
			if (lane != NULL)
			{
				lane->open = 0; /* Python may receive a part of a message now */
				if (lane->filled > 0)
				{
					lane->leaves = 1;
					lane_touch(lane);
				}
			}
			found[count].fd = fd;
			found[count].events = events[i].events;
			count++;
		}
		if (run_due(loop) || count > 0 || timeout_ns == 0 || (until_ns >= 0 && lane_now_ns() >= until_ns))
			return count;
	}
}

/* Whether the connection is in use (one that is being closed is not), and Python has nothing to send before what the lane sends. */
bool
lane_sends_directly(const Lane *lane)
{
	const LaneLoop *loop = lane->loop;

	return loop != NULL && loop->watched[lane->fd].events == EPOLLIN;
}

/* Receive what is there, as far as it fits; false when nothing came: Python must find out why. */
bool
lane_receive(Lane *lane)
{
	ssize_t		got = recv(lane->fd, lane->buffer + lane->filled, lane->size - lane->filled, MSG_DONTWAIT);

	if (got <= 0)
		return false;
	lane->filled += (size_t) got;
	lane->received += (size_t) got;
	return true;
}

/* The first bytes of the buffer were taken; the rest moves to the front. */
void
lane_drop(Lane *lane, size_t taken)
{
	lane->filled -= taken;
	if (taken > 0 && lane->filled > 0)
		memmove(lane->buffer, lane->buffer + taken, lane->filled);
}

/* Send three pieces as one; how many bytes went.  What did not go is the caller's to keep: Python sends it. */
size_t
lane_send(Lane *lane, const void *head, size_t head_bytes, const void *data, size_t data_bytes, const void *more,
		  size_t more_bytes)
{
	struct iovec pieces[3] = {{(void *) head, head_bytes}, {(void *) data, data_bytes}, {(void *) more, more_bytes}};
	struct msghdr message = {.msg_iov = pieces, .msg_iovlen = more_bytes ? 3 : data_bytes ? 2 : 1};
	ssize_t		sent = sendmsg(lane->fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL);

	if (sent <= 0)
		return 0;
	lane->sent += (size_t) sent;
	return (size_t) sent;
}

/* Sizes of the structures that Python mirrors. */
const uint32_t *
lane_layout(void)
{
	static const uint32_t layout[] = {sizeof(Lane), sizeof(AppendLane), sizeof(ProposerMember), sizeof(ProposerLane)};

	return layout;
}
