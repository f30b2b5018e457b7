/*
 * Connections of which a lane has one end: sockets, what Python does with them, and the other end's sends and reads.
 *
 * It checks that a lane runs only while it is open and Python has no bytes of its connection, that it reads nothing behind
 * what it has received, that nothing but the beginning of a message stays in it, and that the loop lists no lane twice, and
 * none that was detached.
 */
#include <errno.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <sanitizer/asan_interface.h>

#include "lane_fuzz.h"

Link	   *links[MOST_LINKS];
int			link_count;

static Link *
link_of(const Lane *lane)
{
	for (int i = 0; i < link_count; i++)
		if (links[i]->lane == lane)
			return links[i];
	require(false, "a lane that nobody attached");
	return NULL;
}

/* Runs the lane with memory that ends where the bytes end that it will have received. */
static LaneResult
exact_readable(Lane *lane)
{
	const Link *link = link_of(lane);
	size_t		room = lane->size - lane->filled;
	ssize_t		comes = recv(lane->fd, lane->buffer + lane->filled, room, MSG_DONTWAIT | MSG_PEEK);
	size_t		end = lane->filled + (comes > 0 ? (size_t) comes : 0);
	LaneResult	result;

	require(lane->open != 0, "a lane runs that is not open");
	require(link->queue.size == 0 && link->held.size == 0, "a lane runs while Python has bytes of this connection");
	ASAN_POISON_MEMORY_REGION(lane->buffer + end, lane->size - end);
	result = link->readable(lane);
	ASAN_UNPOISON_MEMORY_REGION(lane->buffer, lane->size);
	require(lane->filled <= end, "a lane has more bytes than it was sent");
	require(result == LANE_TOOK || result == LANE_LEAVES, "a result that is none");
	return result;
}

void
watch(Link *link)
{
	struct epoll_event event = {.events = (link->paused ? 0 : EPOLLIN) | (link->queue.size ? EPOLLOUT : 0)};

	event.data.fd = link->fd;
	require(epoll_ctl(link->epoll_fd, EPOLL_CTL_MOD, link->fd, &event) == 0, "epoll_ctl failed");
	require(lane_loop_watch(link->lane->loop, link->fd, event.events) == 0, "lane_loop_watch failed");
}

void
open_link(Link *link, LaneLoop *loop, int epoll_fd, Lane *lane, LaneResult (*readable) (Lane *), void (*due) (Lane *, int64_t),
		  size_t buffer_bytes)
{
	static const int sizes[] = {1, 1, 8000, 30000, 200000};
	struct epoll_event event = {.events = EPOLLIN};
	int			ends[2];

	require(socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0, ends) == 0, "no socket");
	for (int i = 0; i < 2; i++)
		require(setsockopt(ends[i], SOL_SOCKET, SO_SNDBUF, &sizes[below(5)], sizeof(int)) == 0, "setsockopt failed");
	*link = (Link)
	{
		.lane = lane, .readable = readable, .fd = ends[0], .peer = ends[1], .epoll_fd = epoll_fd
	};
	lane->readable = exact_readable;
	lane->due = due;
	lane->fd = link->fd;
	lane->buffer = allocate(buffer_bytes);
	lane->size = buffer_bytes;
	event.data.fd = link->fd;
	require(epoll_ctl(epoll_fd, EPOLL_CTL_ADD, link->fd, &event) == 0, "epoll_ctl failed");
	require(lane_loop_watch(loop, link->fd, EPOLLIN) == 0 && lane_loop_attach(loop, lane) == 0, "a lane cannot be attached");
	require(lane_loop_attach(loop, lane) == -1 && errno == EEXIST, "a lane is attached twice");
	links[link_count++] = link;
}

void
detach_link(Link *link)
{
	LaneLoop   *loop = link->lane->loop;
	Lane	   *touched[MOST_LINKS];

	lane_touch(link->lane);
	lane_loop_detach(loop, link->lane);
	require(link->lane->loop == NULL && !link->lane->touched, "a detached lane is attached");
	lane_touch(link->lane);
	for (int i = lane_loop_touched(loop, touched, MOST_LINKS); i > 0; i--)
		require(touched[i - 1] != link->lane, "a detached lane is listed");
}

void
close_link(Link *link)
{
	if (one_in(2))
		detach_link(link);
	free(link->lane->buffer);
	link->lane->buffer = NULL;
	(void) close(link->fd);
	(void) close(link->peer);
	release(&link->queue);
	release(&link->held);
}

/* How many of these bytes the socket takes. */
size_t
send_some(int fd, const uint8_t *data, size_t count)
{
	ssize_t		sent = count > 0 ? send(fd, data, count, MSG_DONTWAIT | MSG_NOSIGNAL) : 0;

	require(sent >= 0 || errno == EAGAIN, "a socket failed");
	return sent > 0 ? (size_t) sent : 0;
}

size_t
receive_some(int fd, Bytes *into, size_t most)
{
	ssize_t		got = recv(fd, grow(into, most), most, MSG_DONTWAIT);

	require(got > 0 || (got < 0 && errno == EAGAIN), "a socket failed");
	into->size -= most - (got > 0 ? (size_t) got : 0);
	return got > 0 ? (size_t) got : 0;
}

void
flush_queue(Link *link)
{
	drop(&link->queue, send_some(link->fd, link->queue.at, link->queue.size));
	watch(link);
}

/* As an asyncio transport: what the socket does not take waits for room. */
void
python_write(Link *link, const uint8_t *data, size_t count)
{
	bool		waits = link->queue.size > 0;

	add(&link->queue, data, count);
	if (!waits)
		flush_queue(link);
}

/* Python receives: often just the rest of a message, so that the lane comes to its turn again. */
void
python_receives(Link *link, size_t most)
{
	const Bytes *held = &link->held;
	size_t		size = held->size >= 5 ? 1 + (size_t) number(held->at + 1, 4) : 5;

	if (held->size > 0 && size > held->size && size - held->size < most && !one_in(4))
		most = size - held->size;
	else
		most = 1 + below(most);
	link->received += receive_some(link->fd, &link->held, most);
}

/* What Lane.hand_over() does, after count_traffic(). */
void
count_and_hand_over(Link *link)
{
	Lane	   *lane = link->lane;

	link->received += lane->received;
	lane->received = lane->sent = 0;
	if (lane->leaves)
	{
		seen.left_to_python++;
		require(lane->filled > 0, "a lane leaves nothing");
		lane->leaves = 0;
		lane->open = 0;
		add(&link->held, lane->buffer, lane->filled);
		lane->filled = 0;
	}
	require(lane->filled == 0 || (lane->buffer[0] == 'd' && whole_message(lane->buffer, lane->filled) == 0),
			"a message that the lane does not take waits in it");
}

/* Wait, and see that what is said to have happened did. */
int
wait_for_events(LaneLoop *loop, LaneEvent *found, int most)
{
	int64_t		timeout_ns = one_in(4) ? below(3000000) : 0;
	int			count = lane_loop_wait(loop, timeout_ns, found, most);

	require(count >= 0 && count <= most, "lane_loop_wait failed");
	return count;
}

int
touched_lanes(LaneLoop *loop, Lane **touched, int most)
{
	int			count = lane_loop_touched(loop, touched, most);

	require(count >= 0 && count <= most, "lane_loop_touched failed");
	for (int i = 0; i < count; i++)
	{
		(void) link_of(touched[i]);
		for (int k = 0; k < i; k++)
			require(touched[i] != touched[k], "a lane is listed twice");
	}
	return count;
}
