// Memory of the calling thread that grows, stays, and ends with the thread.
#pragma once
#include <pthread.h>
#include <stdlib.h>

enum { ROOMS = 8 };
typedef struct { char *at; size_t bytes; } Room;
static pthread_key_t rooms_key;

static void free_rooms(void *rooms) {
    for (int which = 0; which < ROOMS; which++) free(((Room *)rooms)[which].at);
    free(rooms);
}

__attribute__((constructor)) static void make_key(void) { pthread_key_create(&rooms_key, free_rooms); }

// At least `bytes`, aligned to a line; what was in room `which` is lost when it grows.
static char *scratch(int which, size_t bytes) {
    Room *rooms = pthread_getspecific(rooms_key);
    if (!rooms) pthread_setspecific(rooms_key, rooms = calloc(ROOMS, sizeof(Room)));
    Room *room = &rooms[which];
    if (room->bytes < bytes) {
        free(room->at);
        room->bytes = (bytes + bytes / 2 + 63) / 64 * 64;
        room->at = aligned_alloc(64, room->bytes);
    }
    return room->at;
}
