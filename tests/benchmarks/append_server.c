/*
 * A safekeeper reduced to its system calls, in C: receive appends, write them, one fdatasync a batch, acknowledge.
 *
 *   append_server DIRECTORY START_LSN SEGMENT_BYTES SEGMENTS
 *
 * Prints the port it listens on, serves one connection that sends AppendRequests in CopyData messages (protocol 3), and ends
 * with it.  It checks nothing: no record, no term, no CRC.  Segments are filled with zeros and synced before it listens.
 */
#include "append_files.h"

#include <arpa/inet.h>
#include <endian.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <sys/socket.h>

#define BUFFER_BYTES (4 << 20)
#define FRAME_BYTES 5			/* 'd', length */
#define APPEND_BYTES 45			/* an AppendRequest in front of its WAL */

static uint64_t
get_u64(const char *at)
{
	uint64_t	value;

	memcpy(&value, at, sizeof(value));
	return be64toh(value);
}

static int
accept_one(void)
{
	struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
	socklen_t	length = sizeof(address);
	int			listener = socket(AF_INET, SOCK_STREAM, 0),
				one = 1,
				link;

	if (listener < 0 || bind(listener, (struct sockaddr *) &address, length) != 0 || listen(listener, 1) != 0 ||
		getsockname(listener, (struct sockaddr *) &address, &length) != 0)
		fail("listen");
	printf("%d\n", ntohs(address.sin_port));
	fflush(stdout);
	link = accept(listener, NULL, NULL);
	if (link < 0 || setsockopt(link, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one)) != 0)
		fail("accept");
	close(listener);
	return link;
}

static void
acknowledge(int link, const char *request, uint64_t flush_lsn)
{
	char		answer[FRAME_BYTES + 53] = {0};
	uint32_t	length = htonl(sizeof(answer) - 1);
	uint64_t	lsn = htobe64(flush_lsn);

	answer[0] = 'd';
	memcpy(answer + 1, &length, 4);
	answer[5] = 'a';
	memcpy(answer + 6, request + 1, 12);	/* generation and term */
	memcpy(answer + 18, &lsn, 8);
	if (send(link, answer, sizeof(answer), MSG_NOSIGNAL) != sizeof(answer))
		fail("send");
}

int
main(int argc, char **argv)
{
	char	   *buffer = malloc(BUFFER_BYTES);
	size_t		segment_size,
				segments,
				filled = 0;
	uint64_t	start;
	int		   *files,
				link;

	if (argc != 5 || buffer == NULL)
	{
		fprintf(stderr, "usage: append_server DIRECTORY START_LSN SEGMENT_BYTES SEGMENTS\n");
		return 2;
	}
	start = strtoull(argv[2], NULL, 10);
	segment_size = strtoull(argv[3], NULL, 10);
	segments = strtoull(argv[4], NULL, 10);
	files = calloc(segments, sizeof(int));
	if (files == NULL)
		fail("calloc");
	for (size_t number = 0; number < segments; number++)
		files[number] = make_segment(argv[1], number, segment_size);
	link = accept_one();
	for (;;)
	{
		ssize_t		got = recv(link, buffer + filled, BUFFER_BYTES - filled, 0);
		size_t		at = 0,
					last = 0;
		uint64_t	end = 0;
		int			file = -1;

		if (got <= 0)
			return got < 0;
		filled += (size_t) got;
		while (filled - at >= FRAME_BYTES)
		{
			char	   *request = buffer + at + FRAME_BYTES;
			uint32_t	length;
			uint64_t	position;

			memcpy(&length, buffer + at + 1, 4);
			length = ntohl(length);
			if (length < 4 + APPEND_BYTES || length > BUFFER_BYTES / 2)
			{
				fprintf(stderr, "not an append: %u bytes\n", length);
				return 1;
			}
			if (filled - at < 1 + (size_t) length)
				break;
			position = get_u64(request + 13);
			end = get_u64(request + 21);
			for (char *data = request + APPEND_BYTES; position < end;)
			{
				size_t		number = (position - start) / segment_size;
				size_t		offset = (position - start) % segment_size;
				size_t		count = end - position < segment_size - offset ? end - position : segment_size - offset;

				if (number >= segments)
				{
					fprintf(stderr, "more WAL than segments\n");
					return 1;
				}
				if (file >= 0 && file != files[number] && fdatasync(file) != 0)
					fail("fdatasync");
				file = files[number];
				if (pwrite(file, data, count, (off_t) offset) != (ssize_t) count)
					fail("pwrite");
				data += count;
				position += count;
			}
			last = at + FRAME_BYTES;
			at += 1 + length;
		}
		if (file >= 0)
		{
			if (fdatasync(file) != 0)
				fail("fdatasync");
			acknowledge(link, buffer + last, end);
		}
		filled -= at;
		memmove(buffer, buffer + at, filled);
	}
}
