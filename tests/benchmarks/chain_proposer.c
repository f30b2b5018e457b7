/*
 * A proposer reduced to its system calls, in C: WAL of a stock Postgres goes to three append_server, and a position that two of
 * them have acknowledged goes back as the standby's status.  It checks nothing: no term, no election, no catching up.
 *
 *   chain_proposer SOCKET USER APPLICATION_NAME START_LSN PORT PORT PORT
 *
 * SOCKET is Postgres's Unix socket, START_LSN a decimal number.  As ours, it sends a small append to a server only when the one
 * before was acknowledged, and feeds the third server at most 10 ms late.  Prints "ready" when Postgres streams; ends with it.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <endian.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#define SERVERS 3
#define LAZY 2					/* the server that is fed late */
#define LAZY_S 0.010
#define LAZY_BYTES (256 << 10)
#define RING_BYTES (64 << 20)
#define MOST_BYTES (128 << 10)	/* of one append */
#define FRAME_BYTES 5			/* a message's tag and length */
#define APPEND_BYTES 45			/* an AppendRequest in front of its WAL */
#define XLOG_DATA_BYTES 25		/* XLogData in front of its WAL */
#define KEEPALIVE_REPLY 17		/* the byte of a keepalive that asks for an answer */
#define ANSWER_BYTES (FRAME_BYTES + 53)
#define STATUS_BYTES (FRAME_BYTES + 34)

typedef struct Server
{
	int			link;
	uint64_t	sent,
				flushed;
	bool		awaiting;
} Server;

static char ring[RING_BYTES];
static uint64_t end_lsn;
static Server servers[SERVERS];
static double lazy_due_s;		/* 0: nothing waits */

static void
fail(const char *what)
{
	perror(what);
	exit(1);
}

static double
now_s(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (double) now.tv_sec + (double) now.tv_nsec / 1e9;
}

static void
put_u32(char *at, uint32_t value)
{
	value = htobe32(value);
	memcpy(at, &value, sizeof(value));
}

static void
put_u64(char *at, uint64_t value)
{
	value = htobe64(value);
	memcpy(at, &value, sizeof(value));
}

static uint32_t
get_u32(const char *at)
{
	uint32_t	value;

	memcpy(&value, at, sizeof(value));
	return be32toh(value);
}

static uint64_t
get_u64(const char *at)
{
	uint64_t	value;

	memcpy(&value, at, sizeof(value));
	return be64toh(value);
}

static void
send_all(int link, const char *data, size_t length)
{
	while (length > 0)
	{
		ssize_t		sent = send(link, data, length, MSG_NOSIGNAL);

		if (sent <= 0)
			fail("send");
		data += sent;
		length -= (size_t) sent;
	}
}

static void
receive_all(int link, char *data, size_t length)
{
	while (length > 0)
	{
		ssize_t		got = recv(link, data, length, 0);

		if (got <= 0)
			fail("recv");
		data += got;
		length -= (size_t) got;
	}
}

/* Read messages up to one with this tag; an ErrorResponse ends the program. */
static void
await_message(int link, char wanted)
{
	char		head[FRAME_BYTES];

	do
	{
		static char body[1 << 16];
		size_t		length;

		receive_all(link, head, sizeof(head));
		length = get_u32(head + 1) - 4;
		if (length >= sizeof(body))
		{
			fprintf(stderr, "a message of %zu bytes from Postgres\n", length);
			exit(1);
		}
		receive_all(link, body, length);
		if (head[0] == 'E')
		{
			for (size_t i = 0; i < length; i++)
				if (body[i] == '\0')
					body[i] = ' ';
			fprintf(stderr, "Postgres: %.*s\n", (int) length, body);
			exit(1);
		}
	} while (head[0] != wanted);
}

static int
connect_postgres(const char *path, const char *user, const char *name)
{
	struct sockaddr_un address = {.sun_family = AF_UNIX};
	const char *settings[] = {"user", user, "replication", "true", "application_name", name};
	char		packet[1024];
	size_t		at = 8;
	int			link = socket(AF_UNIX, SOCK_STREAM, 0);

	if (strlen(path) >= sizeof(address.sun_path) || strlen(user) + strlen(name) > 512)
	{
		fprintf(stderr, "too long: %s\n", path);
		exit(2);
	}
	strcpy(address.sun_path, path);
	if (link < 0 || connect(link, (struct sockaddr *) &address, sizeof(address)) != 0)
		fail(path);
	for (size_t i = 0; i < sizeof(settings) / sizeof(settings[0]); i++)
		at += (size_t) sprintf(packet + at, "%s", settings[i]) + 1;
	packet[at++] = '\0';
	put_u32(packet, (uint32_t) at);
	put_u32(packet + 4, 3 << 16);
	send_all(link, packet, at);
	await_message(link, 'Z');
	return link;
}

static void
start_replication(int link, uint64_t lsn)
{
	char		query[128];
	size_t		length = 4;

	length += (size_t) sprintf(query + FRAME_BYTES, "START_REPLICATION PHYSICAL %X/%X", (unsigned) (lsn >> 32), (unsigned) lsn) + 1;
	query[0] = 'Q';
	put_u32(query + 1, (uint32_t) length);
	send_all(link, query, 1 + length);
	await_message(link, 'W');
}

static int
connect_server(const char *port)
{
	struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
	int			link = socket(AF_INET, SOCK_STREAM, 0),
				one = 1;

	address.sin_port = htons((uint16_t) atoi(port));
	if (link < 0 || connect(link, (struct sockaddr *) &address, sizeof(address)) != 0 ||
		setsockopt(link, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one)) != 0)
		fail(port);
	return link;
}

/* Send one append, unless a small one has to wait for the answer to the one before. */
static void
pump(Server *server)
{
	static char message[FRAME_BYTES + APPEND_BYTES + MOST_BYTES];
	uint64_t	length = end_lsn - server->sent;

	if (length == 0 || (server->awaiting && length < MOST_BYTES))
		return;
	if (length > MOST_BYTES)
		length = MOST_BYTES;
	message[0] = 'd';
	put_u32(message + 1, (uint32_t) (4 + APPEND_BYTES + length));
	message[5] = 'a';
	put_u64(message + 18, server->sent);
	put_u64(message + 26, server->sent + length);
	for (uint64_t done = 0; done < length;)
	{
		size_t		at = (server->sent + done) % RING_BYTES;
		size_t		count = length - done < RING_BYTES - at ? length - done : RING_BYTES - at;

		memcpy(message + FRAME_BYTES + APPEND_BYTES + done, ring + at, count);
		done += count;
	}
	send_all(server->link, message, FRAME_BYTES + APPEND_BYTES + length);
	server->sent += length;
	server->awaiting = true;
}

static void
take_wal(const char *data, size_t length)
{
	for (size_t done = 0; done < length;)
	{
		size_t		at = end_lsn % RING_BYTES;
		size_t		count = length - done < RING_BYTES - at ? length - done : RING_BYTES - at;

		memcpy(ring + at, data + done, count);
		done += count;
		end_lsn += count;
	}
}

/* The greatest position that two of three have. */
static uint64_t
committed(void)
{
	uint64_t	a = servers[0].flushed,
				b = servers[1].flushed,
				c = servers[2].flushed;
	uint64_t	low = a < b ? a : b,
				high = a < b ? b : a;

	return c <= low ? low : c >= high ? high : c;
}

static void
send_status(int postgres)
{
	char		status[STATUS_BYTES] = {'d'};

	put_u32(status + 1, STATUS_BYTES - 1);
	status[FRAME_BYTES] = 'r';
	for (int i = 0; i < 3; i++) /* written, flushed, applied */
		put_u64(status + FRAME_BYTES + 1 + 8 * i, committed());
	send_all(postgres, status, sizeof(status));
}

/* What Postgres has sent; false at the end of its stream. */
static bool
read_postgres(int postgres)
{
	static char buffer[4 << 20];
	static size_t filled;
	ssize_t		got = recv(postgres, buffer + filled, sizeof(buffer) - filled, 0);
	size_t		at = 0;

	if (got <= 0)
		return false;
	filled += (size_t) got;
	while (filled - at >= FRAME_BYTES)
	{
		size_t		length = 1 + (size_t) get_u32(buffer + at + 1);

		if (length > filled - at)
			break;
		if (buffer[at] != 'd')
			return false;
		if (buffer[at + FRAME_BYTES] == 'w')
			take_wal(buffer + at + FRAME_BYTES + XLOG_DATA_BYTES, length - FRAME_BYTES - XLOG_DATA_BYTES);
		else if (buffer[at + FRAME_BYTES] == 'k' && buffer[at + FRAME_BYTES + KEEPALIVE_REPLY] != 0)
			send_status(postgres);
		at += length;
	}
	filled -= at;
	memmove(buffer, buffer + at, filled);
	for (int i = 0; i < SERVERS; i++)
		if (i != LAZY || end_lsn - servers[i].sent >= LAZY_BYTES)
			pump(&servers[i]);
	if (lazy_due_s == 0 && servers[LAZY].sent != end_lsn)
		lazy_due_s = now_s() + LAZY_S;
	return true;
}

static void
read_server(Server *server, int postgres)
{
	static uint64_t told;
	char		answers[ANSWER_BYTES * 64];
	ssize_t		got = recv(server->link, answers, sizeof(answers), 0);

	if (got <= 0 || got % ANSWER_BYTES != 0)
	{
		fprintf(stderr, "an answer of %zd bytes\n", got);
		exit(1);
	}
	server->flushed = get_u64(answers + got - ANSWER_BYTES + 18);
	server->awaiting = false;
	if (committed() > told)
	{
		told = committed();
		send_status(postgres);
	}
	if (server != &servers[LAZY] || end_lsn - server->sent >= LAZY_BYTES)
		pump(server);
}

int
main(int argc, char **argv)
{
	int			postgres,
				poll = epoll_create1(0);
	struct epoll_event event = {.events = EPOLLIN};

	if (argc != 5 + SERVERS)
	{
		fprintf(stderr, "usage: chain_proposer SOCKET USER APPLICATION_NAME START_LSN PORT PORT PORT\n");
		return 2;
	}
	end_lsn = strtoull(argv[4], NULL, 10);
	postgres = connect_postgres(argv[1], argv[2], argv[3]);
	start_replication(postgres, end_lsn);
	event.data.u32 = SERVERS;
	if (poll < 0 || epoll_ctl(poll, EPOLL_CTL_ADD, postgres, &event) != 0)
		fail("epoll");
	for (int i = 0; i < SERVERS; i++)
	{
		servers[i] = (Server) {.link = connect_server(argv[5 + i]), .sent = end_lsn, .flushed = end_lsn};
		event.data.u32 = (uint32_t) i;
		if (epoll_ctl(poll, EPOLL_CTL_ADD, servers[i].link, &event) != 0)
			fail("epoll");
	}
	printf("ready\n");
	fflush(stdout);
	for (;;)
	{
		struct epoll_event events[SERVERS + 1];
		double		left_s = lazy_due_s - now_s();
		int			count = epoll_wait(poll, events, SERVERS + 1, lazy_due_s == 0 ? -1 : left_s > 0 ? (int) (left_s * 1000) + 1 : 0);

		if (lazy_due_s != 0 && now_s() >= lazy_due_s)
		{
			lazy_due_s = 0;
			servers[LAZY].awaiting = false;
			pump(&servers[LAZY]);
		}
		for (int i = 0; i < count; i++)
		{
			if (events[i].data.u32 < SERVERS)
				read_server(&servers[events[i].data.u32], postgres);
			else if (!read_postgres(postgres))
				return 0;
		}
	}
}
