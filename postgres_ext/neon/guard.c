/*
 * guard.c
 *		Make the data directory useless without this library.
 *
 * Relation files are full of holes, which stock Postgres would take for valid
 * empty pages.  So "pg_wal" and "base" are links to /proc/self/fd/N, which lead
 * nowhere except in a process tree whose postmaster has run this code: without
 * it the server stops at "required WAL directory does not exist" before any
 * write, and so do pg_resetwal and pg_checksums.  Backup tools that would copy
 * the holes stop at a file that nobody may read.
 */
#include "neon.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "storage/fd.h"

#define NO_BASEBACKUP_FILE	"neon.no_basebackup"
#define LINK_PREFIX			"/proc/self/fd/"

/* Open the real directory on the descriptor that the link names; children inherit it by fork and by exec. */
static void
open_guarded(const char *name, const char *real)
{
	char		target[64];
	char		rest;
	ssize_t		length = readlink(name, target, sizeof(target) - 1);
	int			wanted,
				fd;

	target[Max(length, 0)] = '\0';
	if (length < 0 || sscanf(target, LINK_PREFIX "%d%c", &wanted, &rest) != 1 || wanted < 3)
		ereport(FATAL,
				(errcode(ERRCODE_DATA_CORRUPTED),
				 errmsg("\"%s\" is not a link to \"%sN\"", name, LINK_PREFIX),
				 errdetail("This is not a compute's data directory, or somebody has changed it by hand."),
				 errhint("A compute's directory is made anew at each start; start it with compute_ctl.")));
	if (fcntl(wanted, F_GETFD) >= 0)
		ereport(FATAL, (errmsg("file descriptor %d, which \"%s\" needs, is in use", wanted, name)));
	fd = open(real, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	if (fd < 0)
		ereport(FATAL, (errcode_for_file_access(), errmsg("could not open directory \"%s\": %m", real)));
	if (dup2(fd, wanted) != wanted)
		ereport(FATAL,
				(errcode_for_file_access(),
				 errmsg("could not use file descriptor %d for \"%s\": %m", wanted, name),
				 errhint("The limit on open files (ulimit -n) must be above %d.", wanted)));
	close(fd);
}

void
neon_guard_check(void)
{
	struct stat status;

	if (lstat(NO_BASEBACKUP_FILE, &status) != 0 || (status.st_mode & 0777) != 0)
		ereport(FATAL,
				(errcode(ERRCODE_DATA_CORRUPTED),
				 errmsg("file \"%s\" with mode 0000 is missing", NO_BASEBACKUP_FILE),
				 errdetail("It keeps backup tools from copying files with holes."),
				 errhint("A compute's directory is made anew at each start; start it with compute_ctl.")));
	open_guarded("pg_wal", "pg_wal.neon");
	open_guarded("base", "base.neon");
}
