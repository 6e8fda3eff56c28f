"""Who waits for what: the queue and its worker, jobs and their progress, and forked processes."""
