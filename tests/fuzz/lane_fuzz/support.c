/*
 * Small things for all inputs: random numbers, bytes, messages, and what the lanes get instead of the system's clock, waits and
 * writes.
 *
 * It checks that a wait has an end, and says what failed, and with which input, when any check of the others does.
 */
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#include "lane_fuzz.h"

Seen		seen;
unsigned long seed,
			input;
uint64_t	random_state;
uint64_t	clock_ns = 1000000000000;

uint32_t
next_random(void)
{
	random_state ^= random_state << 13;
	random_state ^= random_state >> 7;
	random_state ^= random_state << 17;
	return (uint32_t) (random_state >> 16);
}

uint32_t
below(size_t limit)
{
	return (uint32_t) (next_random() % limit);
}

bool
one_in(uint32_t chances)
{
	return next_random() % chances == 0;
}

/* Up to `most`, and often little. */
size_t
some(size_t most)
{
	static const size_t limits[] = {1, 4, 30, 60, 300, 1000, 9000, 40000, 180000};
	size_t		limit = limits[below(sizeof(limits) / sizeof(limits[0]))];

	return 1 + below(limit < most ? limit : most);
}

void
require(bool condition, const char *what)
{
	if (!condition)
	{
		(void) fprintf(stderr, "lane_fuzz: %s (seed %lu, input %lu)\n", what, seed, input);
		abort();
	}
}

/* Time goes on by a random step each time somebody looks, and at no other time. */
int
clock_gettime(clockid_t clock, struct timespec *now)
{
	(void) clock;
	clock_ns += next_random() % 40000;
	now->tv_sec = (time_t) (clock_ns / 1000000000);
	now->tv_nsec = (long) (clock_ns % 1000000000);
	return 0;
}

/* No wait takes any time but that of our clock. */
int
epoll_wait(int epoll_fd, struct epoll_event *events, int most, int timeout_ms)
{
	int			ready = epoll_pwait(epoll_fd, events, most, 0, NULL);

	if (ready == 0 && timeout_ms != 0)
	{
		require(timeout_ms > 0, "a wait without an end");
		clock_ns += (uint64_t) timeout_ms * 1000000;
	}
	return ready;
}

/* The same, on a kernel that counts in nanoseconds; or not, as it is decided once for a process. */
int
epoll_pwait2(int epoll_fd, struct epoll_event *events, int most, const struct timespec *left, const sigset_t *mask)
{
	uint64_t	left_ns = (uint64_t) left->tv_sec * 1000000000 + (uint64_t) left->tv_nsec;
	int			ready;

	if (seed % 3 == 0)
	{
		errno = seed % 2 ? ENOSYS : EPERM;
		return -1;
	}
	require(left_ns > 0, "a wait of no time has its own way");
	ready = epoll_pwait(epoll_fd, events, most, 0, mask);
	if (ready == 0)
		clock_ns += left_ns;
	return ready;
}

/* A file system that often writes less than it was given. */
ssize_t
pwritev2(int fd, const struct iovec *pieces, int count, off_t offset, int flags)
{
	ssize_t		written = 0;

	(void) flags;
	for (int i = 0; i < count; i++)
	{
		size_t		size = one_in(50) ? below(pieces[i].iov_len + 1) : pieces[i].iov_len;

		require(pwrite(fd, pieces[i].iov_base, size, offset + written) == (ssize_t) size, "cannot write");
		written += (ssize_t) size;
		if (size < pieces[i].iov_len)
			break;
	}
	if (written == 0)
	{
		written = pwrite(fd, pieces[0].iov_base, 1, offset);
		require(written == 1, "cannot write");
	}
	return written;
}

uint8_t *
grow(Bytes *bytes, size_t count)
{
	if (bytes->size + count > bytes->room)
	{
		bytes->room = (bytes->size + count) * 2;
		bytes->at = realloc(bytes->at, bytes->room);
		require(bytes->at != NULL, "out of memory");
	}
	bytes->size += count;
	return bytes->at + bytes->size - count;
}

void
add(Bytes *bytes, const void *data, size_t count)
{
	if (count > 0)
		memcpy(grow(bytes, count), data, count);
}

void
drop(Bytes *bytes, size_t count)
{
	require(count <= bytes->size, "the driver drops more than it has");
	bytes->size -= count;
	if (bytes->size > 0 && count > 0)
		memmove(bytes->at, bytes->at + count, bytes->size);
}

void
release(Bytes *bytes)
{
	free(bytes->at);
	*bytes = (Bytes)
	{
		0
	};
}

uint8_t *
allocate(size_t count)
{
	uint8_t    *memory = malloc(count ? count : 1);

	require(memory != NULL, "out of memory");
	return memory;
}

/* Numbers as they are sent; not with lane.h's functions, which are under test. */
uint64_t
number(const uint8_t *at, int bytes)
{
	uint64_t	value = 0;

	for (int i = 0; i < bytes; i++)
		value = value << 8 | at[i];
	return value;
}

static void
put_number(uint8_t *at, int bytes, uint64_t value)
{
	for (int i = bytes - 1; i >= 0; i--, value >>= 8)
		at[i] = (uint8_t) value;
}

/* The fields of a message, each as its size in bytes and its value, ended by 0. */
void
add_fields(Bytes *bytes, ...)
{
	va_list		fields;
	int			size;

	va_start(fields, bytes);
	while ((size = va_arg(fields, int)) != 0)
	{
		uint64_t	value = va_arg(fields, uint64_t);

		put_number(grow(bytes, (size_t) size), size, value);
	}
	va_end(fields);
}

/* The size of the message that begins here; 0 when it is not here in full, or is none. */
size_t
whole_message(const uint8_t *bytes, size_t count)
{
	size_t		size = count >= 5 ? 1 + (size_t) number(bytes + 1, 4) : 0;

	return size >= 6 && size <= count ? size : 0;
}

uint64_t
max_u64(uint64_t a, uint64_t b)
{
	return a > b ? a : b;
}

uint64_t
min_u64(uint64_t a, uint64_t b)
{
	return a < b ? a : b;
}

/* A few bytes, a field, or a piece of these messages becomes something else. */
void
mutate(uint8_t *data, size_t size)
{
	static const int fields[] = {0, 1, 1, 1, 5, 6, 10, 18, 26, 34, 42};
	static const uint64_t values[] = {0, 1, 4, 5, 28, 29, 30, 49, 50, 57, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, UINT64_MAX, 1 << 20,
	131072, 131073};

	for (uint32_t i = below(3); i < 3; i++)
	{
		size_t		at = below(size);
		size_t		left = size - at;

		switch (below(5))
		{
			case 0:
				data[at] ^= (uint8_t) (1 << below(8));
				break;
			case 1:
				data[at] = (uint8_t) next_random();
				break;
			case 2:
				at = (size_t) fields[below(sizeof(fields) / sizeof(fields[0]))];
				if (at + 8 <= size)
				{
					int			bytes = at == 1 || at == 6 ? 4 : at == 0 || at == 5 ? 1 : 8;
					uint64_t	value = number(data + at, bytes) + below(17) - 8;

					if (one_in(2))
						value = one_in(2) ? below(64) : values[below(sizeof(values) / sizeof(values[0]))];
					put_number(data + at, bytes, value);
				}
				break;
			case 3:
				memset(data + at, one_in(2) ? 0 : 0xFF, 1 + below(left < 9 ? left : 9));
				break;
			default:
				memmove(data + at, data + below(size - left + 1), 1 + below(left < 60 ? left : 60));
		}
	}
}
