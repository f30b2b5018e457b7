/*
 * The floor of a safekeeper's work: write the same bytes in the same batches and make each durable, with nothing else to do.
 *
 *   append_floor ready|new DIRECTORY WAL_FILE SEGMENT_BYTES < BATCH_SIZES
 *
 * BATCH_SIZES has one size in bytes a line.  "ready": files of SEGMENT_BYTES are filled with zeros and synced first, outside
 * of the measured time.  "new": each file is made, empty, when it is needed, and grows with its writes.  Prints the seconds
 * that all batches took.
 */
#include "append_files.h"

#include <sys/stat.h>
#include <time.h>

static double
now_s(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (double) now.tv_sec + (double) now.tv_nsec / 1e9;
}

int
main(int argc, char **argv)
{
	size_t		segment_size,
				position = 0,
				size;
	struct stat found;
	char	   *wal;
	int		   *segments;
	int			file;
	double		begun;

	if (argc != 5 || (strcmp(argv[1], "ready") != 0 && strcmp(argv[1], "new") != 0))
	{
		fprintf(stderr, "usage: append_floor ready|new DIRECTORY WAL_FILE SEGMENT_BYTES < BATCH_SIZES\n");
		return 2;
	}
	segment_size = strtoull(argv[4], NULL, 10);
	file = open(argv[3], O_RDONLY);
	if (file < 0 || fstat(file, &found) != 0)
		fail(argv[3]);
	wal = malloc((size_t) found.st_size);
	if (wal == NULL || read(file, wal, (size_t) found.st_size) != found.st_size)
		fail(argv[3]);
	segments = calloc((size_t) found.st_size / segment_size + 1, sizeof(int));
	if (segments == NULL)
		fail("calloc");
	for (size_t number = 0; number <= (size_t) found.st_size / segment_size; number++)
		segments[number] = argv[1][0] == 'r' ? make_segment(argv[2], number, segment_size) : -1;

	begun = now_s();
	while (scanf("%zu", &size) == 1)
	{
		if (position + size > (size_t) found.st_size)
		{
			fprintf(stderr, "the batches are longer than %s\n", argv[2]);
			return 2;
		}
		while (size > 0)
		{
			size_t		offset = position % segment_size;
			size_t		count = size < segment_size - offset ? size : segment_size - offset;
			int			fd = segments[position / segment_size];

			if (fd < 0)
				fd = segments[position / segment_size] = open_segment(argv[2], position / segment_size);
			if (pwrite(fd, wal + position, count, (off_t) offset) != (ssize_t) count)
				fail("pwrite");
			if (fdatasync(fd) != 0)
				fail("fdatasync");
			position += count;
			size -= count;
		}
	}
	printf("%.6f\n", now_s() - begun);
	return 0;
}
