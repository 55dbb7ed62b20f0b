"""What stops a failing run cleanly or lets it resume: guard, hang watchdog, preemption, requeues, rank consistency."""
