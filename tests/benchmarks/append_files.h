/*
 * What the two C programs about appends share: segments that are filled with zeros and synced, as a safekeeper makes them ahead
 * of need.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static void
fail(const char *what)
{
	perror(what);
	exit(1);
}

static int
open_segment(const char *directory, size_t number)
{
	char		path[4096];
	int			fd;

	snprintf(path, sizeof(path), "%s/segment%zu", directory, number);
	fd = open(path, O_RDWR | O_CREAT | O_TRUNC, 0600);
	if (fd < 0)
		fail(path);
	return fd;
}

static int
make_segment(const char *directory, size_t number, size_t size)
{
	char	   *zeros = calloc(1, 1 << 20);
	int			fd = open_segment(directory, number);

	if (zeros == NULL)
		fail("calloc");
	for (size_t at = 0; at < size; at += 1 << 20)
		if (pwrite(fd, zeros, 1 << 20, (off_t) at) != 1 << 20)
			fail("writing zeros");
	if (fsync(fd) != 0)
		fail("fsync");
	free(zeros);
	return fd;
}
