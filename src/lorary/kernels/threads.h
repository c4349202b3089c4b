/* A share of the work for each thread. */
#include <pthread.h>
#include <stdint.h>

enum { MOST_THREADS = 64 };

static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

typedef struct {
    void (*work)(const void *job, int64_t first, int64_t last);
    const void *job;
    int64_t first, last;
} Share;

static void *run_share(void *given) {
    const Share *share = given;
    share->work(share->job, share->first, share->last);
    return NULL;
}

/* Threads live for one call: none is lost in a fork, and none competes with torch's pool. */
static void split(void (*work)(const void *, int64_t, int64_t), const void *job, int64_t count, int threads) {
    Share shares[MOST_THREADS];
    pthread_t ids[MOST_THREADS];
    int started[MOST_THREADS];
    const int n = threads < 2 || count < 2 ? 1 : (int)smaller(smaller(threads, MOST_THREADS), count);
    for (int i = 0; i < n; i++) shares[i] = (Share){work, job, count * i / n, count * (i + 1) / n};
    for (int i = 1; i < n; i++) started[i] = !pthread_create(&ids[i], NULL, run_share, &shares[i]);
    run_share(&shares[0]);
    for (int i = 1; i < n; i++) {
        if (started[i]) pthread_join(ids[i], NULL);
        else run_share(&shares[i]);
    }
}
