/*
 * The way in.  glibc's start code calls __libc_start_main with the server's
 * main(); this definition, found first because the library is preloaded, calls
 * the real one with ours.
 */
#include "redo.h"

#include <dlfcn.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <unistd.h>

typedef int (*MainFunction) (int, char **, char **);
typedef int (*StartFunction) (MainFunction, int, char **, void (*) (void), void (*) (void), void (*) (void), void *);

extern int	__libc_start_main(MainFunction, int, char **, void (*) (void), void (*) (void), void (*) (void), void *);

/* One line to stderr and exit; the service logs it. */
void
die(const char *format,...)
{
	char		text[512];
	va_list		args;
	int			len;

	va_start(args, format);
	len = vsnprintf(text, sizeof(text) - 1, format, args);
	va_end(args);
	len = Min(len, (int) sizeof(text) - 2);
	text[len++] = '\n';
	if (write(STDERR_FILENO, text, len) < 0)
		_exit(4);
	_exit(3);
}

static int
redo_main(int argc, char **argv, char **envp)
{
	struct rlimit no_core = {0, 0};

	(void) argc;
	(void) argv;
	(void) envp;
	(void) prctl(PR_SET_PDEATHSIG, SIGKILL);
	(void) setrlimit(RLIMIT_CORE, &no_core);
	(void) unsetenv("LD_PRELOAD");
	boot_backend();
	enter_sandbox();
	serve_forever();
}

int
__libc_start_main(MainFunction main_function, int argc, char **argv, void (*init) (void), void (*fini) (void),
				  void (*rtld_fini) (void), void *stack_end)
{
	StartFunction real = (StartFunction) dlsym(RTLD_NEXT, "__libc_start_main");

	(void) main_function;
	if (real == NULL)
		die("neon_redo: no __libc_start_main in the C library");
	return real(redo_main, argc, argv, init, fini, rtld_fini, stack_end);
}
