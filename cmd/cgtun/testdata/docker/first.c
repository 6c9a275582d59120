/* A step whose first act is to send: "first ADDR PORT" sends a datagram and waits
   for the answer. Alone it says when it began, in nanoseconds. */
#include <arpa/inet.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/time.h>
#include <time.h>

int main(int argc, char **argv)
{
	struct sockaddr_in to = {.sin_family = AF_INET};
	struct timeval wait = {.tv_sec = 10};
	struct timespec now;
	char answer[8];
	int s;

	if (argc == 1) {
		clock_gettime(CLOCK_MONOTONIC, &now);
		printf("began %lld\n", now.tv_sec * 1000000000LL + now.tv_nsec);
		return 0;
	}
	s = socket(AF_INET, SOCK_DGRAM, 0);
	if (argc != 3 || inet_pton(AF_INET, argv[1], &to.sin_addr) != 1)
		return 2;
	to.sin_port = htons(atoi(argv[2]));
	if (sendto(s, "first", 5, 0, (struct sockaddr *)&to, sizeof to) != 5) {
		perror("send");
		return 1;
	}
	setsockopt(s, SOL_SOCKET, SO_RCVTIMEO, &wait, sizeof wait);
	if (recv(s, answer, sizeof answer, 0) != 5) {
		perror("answer");
		return 1;
	}
	return 0;
}
