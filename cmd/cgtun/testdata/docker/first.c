/* A step whose first act is to send: "first ADDR PORT" sends a datagram and waits
   for the answer. */
#include <arpa/inet.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/time.h>

int main(int argc, char **argv)
{
	struct sockaddr_in to = {.sin_family = AF_INET};
	struct timeval wait = {.tv_sec = 10};
	char answer[8];
	int s = socket(AF_INET, SOCK_DGRAM, 0);

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
