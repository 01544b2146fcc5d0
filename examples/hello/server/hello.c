/* hello: serves the files of one directory over HTTP, and can ask itself whether it is well.
 *
 *   hello [-p PORT] [-d DIRECTORY]     serve until told to stop
 *   hello --check [-p PORT]            exit 0 when a server on this machine answers "/" with 200
 *   hello --self-test [-d DIRECTORY]   serve on a free port, check that, stop
 */
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/utsname.h>
#include <sys/wait.h>
#include <unistd.h>

enum { REQUEST_LIMIT = 8192, TIMEOUT_SECONDS = 5 };

static void fail(const char *what)
{
    fprintf(stderr, "hello: %s: %s\n", what, strerror(errno));
    exit(1);
}

static int send_all(int to, const char *bytes, size_t count)
{
    while (count > 0) {
        ssize_t sent = send(to, bytes, count, MSG_NOSIGNAL);
        if (sent < 0 && errno == EINTR)
            continue;
        if (sent <= 0)
            return -1;
        bytes += sent;
        count -= (size_t)sent;
    }
    return 0;
}

static const char *content_type(const char *path)
{
    static const char *const types[][2] = {
        {".html", "text/html; charset=utf-8"}, {".css", "text/css; charset=utf-8"},
        {".txt", "text/plain; charset=utf-8"}, {".svg", "image/svg+xml"},
    };
    const char *extension = strrchr(path, '.');
    for (size_t i = 0; extension && i < sizeof types / sizeof *types; i++)
        if (strcmp(extension, types[i][0]) == 0)
            return types[i][1];
    return "application/octet-stream";
}

static void reply(int client, const char *status, const char *type, long length)
{
    char head[256];
    int used = snprintf(head, sizeof head,
                        "HTTP/1.0 %s\r\nContent-Type: %s\r\nContent-Length: %ld\r\nConnection: close\r\n\r\n",
                        status, type, length);
    send_all(client, head, (size_t)used);
}

static void refuse(int client, const char *status)
{
    reply(client, status, "text/plain; charset=utf-8", (long)strlen(status) + 1);
    send_all(client, status, strlen(status));
    send_all(client, "\n", 1);
}

static void answer(int client)
{
    char request[REQUEST_LIMIT + 1], block[16384], path[REQUEST_LIMIT + 16];
    size_t used = 0;
    struct stat about;

    request[0] = 0;
    while (used < REQUEST_LIMIT && !strstr(request, "\r\n\r\n")) {
        ssize_t got = recv(client, request + used, REQUEST_LIMIT - used, 0);
        if (got <= 0)
            return;
        used += (size_t)got;
        request[used] = 0;
    }
    char *method = strtok(request, " "), *target = strtok(NULL, " ?#\r\n");
    if (!method || !target || target[0] != '/') {
        refuse(client, "400 Bad Request");
        return;
    }
    int body = strcmp(method, "GET") == 0;
    if (!body && strcmp(method, "HEAD") != 0) {
        refuse(client, "405 Method Not Allowed");
        return;
    }
    /* Names are not decoded, so a parent directory can only be written as two dots. */
    if (strstr(target, "..")) {
        refuse(client, "403 Forbidden");
        return;
    }
    snprintf(path, sizeof path, ".%s%s", target, target[strlen(target) - 1] == '/' ? "index.html" : "");
    int file = open(path, O_RDONLY | O_NONBLOCK);
    if (file < 0 || fstat(file, &about) != 0 || !S_ISREG(about.st_mode)) {
        if (file >= 0)
            close(file);
        refuse(client, "404 Not Found");
        return;
    }
    reply(client, "200 OK", content_type(path), (long)about.st_size);
    ssize_t got;
    while (body && (got = read(file, block, sizeof block)) > 0)
        if (send_all(client, block, (size_t)got) != 0)
            break;
    close(file);
}

static int listen_on(int port, int *bound)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((unsigned short)port)};
    socklen_t length = sizeof address;
    int yes = 1, server = socket(AF_INET, SOCK_STREAM, 0);

    /* The self-test needs no one from outside. */
    address.sin_addr.s_addr = htonl(port ? INADDR_ANY : INADDR_LOOPBACK);
    if (server < 0)
        fail("socket");
    setsockopt(server, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
    if (bind(server, (struct sockaddr *)&address, sizeof address) != 0 || listen(server, 64) != 0)
        fail("cannot listen");
    if (getsockname(server, (struct sockaddr *)&address, &length) != 0)
        fail("getsockname");
    *bound = ntohs(address.sin_port);
    return server;
}

static void serve(int server)
{
    struct timeval patience = {.tv_sec = TIMEOUT_SECONDS};
    signal(SIGCHLD, SIG_IGN);
    for (;;) {
        int client = accept(server, NULL, NULL);
        if (client < 0)
            continue;
        setsockopt(client, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
        setsockopt(client, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof patience);
        pid_t child = fork();
        if (child == 0) {
            close(server);
            answer(client);
            _exit(0);
        }
        close(client);
    }
}

/* Returns the status that the server on this machine gives for a path, or 0 without an answer. */
static int ask(int port, const char *path)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((unsigned short)port)};
    char request[256], head[64];
    int status = 0, server = socket(AF_INET, SOCK_STREAM, 0);

    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    if (connect(server, (struct sockaddr *)&address, sizeof address) == 0) {
        int used = snprintf(request, sizeof request, "GET %s HTTP/1.0\r\n\r\n", path);
        send_all(server, request, (size_t)used);
        ssize_t got = recv(server, head, sizeof head - 1, MSG_WAITALL);
        head[got > 0 ? got : 0] = 0;
        sscanf(head, "HTTP/1.%*d %d", &status);
    }
    close(server);
    return status;
}

static int self_test(void)
{
    struct utsname machine;
    int port, server = listen_on(0, &port);
    pid_t child = fork();

    if (child == 0) {
        serve(server);
        _exit(0);
    }
    int page = ask(port, "/"), missing = ask(port, "/no-such-page"), outside = ask(port, "/../etc/passwd");
    kill(child, SIGTERM);
    waitpid(child, NULL, 0);
    uname(&machine);
    printf("hello: self-test on %s: / %d, missing page %d, outside %d\n", machine.machine, page, missing, outside);
    return page == 200 && missing == 404 && outside == 403 ? 0 : 1;
}

int main(int count, char **words)
{
    const char *directory = "/srv/site";
    int port = 8080, check = 0, test = 0;

    for (int i = 1; i < count; i++) {
        if (strcmp(words[i], "--check") == 0)
            check = 1;
        else if (strcmp(words[i], "--self-test") == 0)
            test = 1;
        else if (strcmp(words[i], "-p") == 0 && i + 1 < count)
            port = atoi(words[++i]);
        else if (strcmp(words[i], "-d") == 0 && i + 1 < count)
            directory = words[++i];
        else {
            fprintf(stderr, "usage: hello [--check | --self-test] [-p PORT] [-d DIRECTORY]\n");
            return 2;
        }
    }
    if (check)
        return ask(port, "/") == 200 ? 0 : 1;
    if (chdir(directory) != 0)
        fail(directory);
    if (test)
        return self_test();
    int server = listen_on(port, &port);
    printf("hello: serving %s on port %d\n", directory, port);
    fflush(stdout);
    serve(server);
    return 0;
}
