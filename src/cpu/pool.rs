//! A fork-join pool for many small parallel loops.
//!
//! Decoding one token is a few hundred loops of tens of microseconds. A general pool that puts its
//! threads to sleep between them loses that time again in wake-ups, so these threads spin for a
//! short while before they sleep, and a loop never waits for a thread that is asleep: threads join
//! the loop while it is open, and the caller closes it once every task has been taken.

use std::any::Any;
use std::cell::{Cell, UnsafeCell};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;

/// Set in `state` while a loop takes threads in; the bits below count those inside.
const OPEN: usize = 1 << 31;
/// Spins before a thread sleeps: about 50 microseconds.
const SPINS: u32 = 2000;

/// A loop body and its number of tasks; the body outlives the loop.
#[derive(Clone, Copy)]
struct Job {
    body: *const (dyn Fn(usize) + Sync),
    tasks: usize,
}

struct Shared {
    job: UnsafeCell<Option<Job>>,
    state: AtomicUsize,
    next: AtomicUsize,
    /// Counts loops, so that waiting threads see a new one.
    epoch: AtomicU32,
    sleepers: AtomicUsize,
    stop: AtomicBool,
    lock: Mutex<()>,
    wake: Condvar,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

// SAFETY: `job` is written only by the caller that holds `Pool::turn`, while `state` is 0; others
// read it only after they entered an open loop (an acquire of the release that opened it).
unsafe impl Sync for Shared {}
// SAFETY: the pointer in `job` is to a `Sync` closure that outlives the loop.
unsafe impl Send for Shared {}

impl Shared {
    fn work(&self, job: Job) {
        // SAFETY: the loop is open or this thread is inside of it, so the body is alive.
        let body = unsafe { &*job.body };
        let result = catch_unwind(AssertUnwindSafe(|| {
            loop {
                let task = self.next.fetch_add(1, Ordering::Relaxed);
                if task >= job.tasks {
                    break;
                }
                body(task);
            }
        }));
        if let Err(payload) = result {
            self.next.store(job.tasks, Ordering::Relaxed);
            *self.panic.lock().unwrap_or_else(PoisonError::into_inner) = Some(payload);
        }
    }

    fn join_open_loop(&self) {
        let mut state = self.state.load(Ordering::Acquire);
        while state & OPEN != 0 {
            match self.state.compare_exchange_weak(
                state,
                state + 1,
                Ordering::AcqRel,
                Ordering::Acquire,
            ) {
                Ok(_) => {
                    // SAFETY: inside an open loop, `job` is set and nobody writes it.
                    if let Some(job) = unsafe { *self.job.get() } {
                        self.work(job);
                    }
                    self.state.fetch_sub(1, Ordering::Release);
                    return;
                }
                Err(now) => state = now,
            }
        }
    }

    fn worker(&self) {
        IN_LOOP.set(true);
        let mut seen = 0;
        loop {
            let mut spins = 0;
            while self.epoch.load(Ordering::Acquire) == seen {
                if spins < SPINS {
                    spins += 1;
                    std::hint::spin_loop();
                    continue;
                }
                let mut guard = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
                self.sleepers.fetch_add(1, Ordering::SeqCst);
                while self.epoch.load(Ordering::SeqCst) == seen {
                    guard = self
                        .wake
                        .wait(guard)
                        .unwrap_or_else(PoisonError::into_inner);
                }
                self.sleepers.fetch_sub(1, Ordering::SeqCst);
            }
            if self.stop.load(Ordering::Acquire) {
                return;
            }
            seen = self.epoch.load(Ordering::Acquire);
            self.join_open_loop();
        }
    }

    fn announce(&self) {
        self.epoch.fetch_add(1, Ordering::SeqCst);
        if self.sleepers.load(Ordering::SeqCst) > 0 {
            drop(self.lock.lock().unwrap_or_else(PoisonError::into_inner));
            self.wake.notify_all();
        }
    }
}

thread_local! {
    /// Whether this thread is inside a loop already: an inner loop then runs on it alone.
    static IN_LOOP: Cell<bool> = const { Cell::new(false) };
}

/// Threads that run loops together with the caller.
pub(crate) struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    /// Held by the caller whose loop is running.
    turn: Mutex<()>,
}

impl Pool {
    /// `threads` in all, the caller included. Fewer where the system refuses threads.
    pub(crate) fn new(threads: usize) -> Self {
        let shared = Arc::new(Shared {
            job: UnsafeCell::new(None),
            state: AtomicUsize::new(0),
            next: AtomicUsize::new(0),
            epoch: AtomicU32::new(0),
            sleepers: AtomicUsize::new(0),
            stop: AtomicBool::new(false),
            lock: Mutex::new(()),
            wake: Condvar::new(),
            panic: Mutex::new(None),
        });
        let workers = (1..threads.max(1))
            .map_while(|i| {
                let shared = shared.clone();
                std::thread::Builder::new()
                    .name(format!("dust-cpu-{i}"))
                    .spawn(move || shared.worker())
                    .ok()
            })
            .collect();
        Self {
            shared,
            workers,
            turn: Mutex::new(()),
        }
    }

    pub(crate) fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Runs `body(0)` to `body(tasks - 1)`, each once, in any order on any thread. Returns when all
    /// are done. A panic in a task is passed on to the caller.
    pub(crate) fn run(&self, tasks: usize, body: impl Fn(usize) + Sync) {
        if tasks <= 1 || self.workers.is_empty() || IN_LOOP.get() {
            (0..tasks).for_each(body);
            return;
        }
        let turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        let shared = &*self.shared;
        let body: &(dyn Fn(usize) + Sync) = &body;
        // SAFETY: only the lifetime changes; this function returns after the last thread has left.
        let body: *const (dyn Fn(usize) + Sync) = unsafe {
            std::mem::transmute::<&(dyn Fn(usize) + Sync), &'static (dyn Fn(usize) + Sync)>(body)
        };
        let job = Job { body, tasks };
        // SAFETY: `turn` is held and `state` is 0: nobody reads `job` now.
        unsafe { *shared.job.get() = Some(job) };
        shared.next.store(0, Ordering::Relaxed);
        shared.state.store(OPEN, Ordering::Release);
        shared.announce();
        IN_LOOP.set(true);
        shared.work(job);
        IN_LOOP.set(false);
        shared.state.fetch_and(!OPEN, Ordering::AcqRel);
        let mut spins = 0u32;
        while shared.state.load(Ordering::Acquire) != 0 {
            spins += 1;
            if spins > SPINS {
                std::thread::yield_now();
            } else {
                std::hint::spin_loop();
            }
        }
        let panic = shared
            .panic
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        drop(turn);
        if let Some(payload) = panic {
            resume_unwind(payload);
        }
    }

    /// Cuts `data` into runs of `size` (the last may be shorter) and runs `body(index, run)`.
    pub(crate) fn chunks_mut<T: Send>(
        &self,
        data: &mut [T],
        size: usize,
        body: impl Fn(usize, &mut [T]) + Sync,
    ) {
        let len = data.len();
        let shared = SharedMut::new(data);
        self.run(len.div_ceil(size.max(1)), |i| {
            let start = i * size;
            // SAFETY: runs of different indices do not overlap, and each index runs once.
            let run = unsafe { shared.slice(start, size.min(len - start)) };
            body(i, run);
        });
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        self.shared.announce();
        for worker in self.workers.drain(..) {
            // A worker catches the panics of its tasks; there is nothing to report here.
            let _ = worker.join();
        }
    }
}

/// A slice that the tasks of one loop write at disjoint places.
#[derive(Clone, Copy)]
pub(crate) struct SharedMut<T> {
    ptr: *mut T,
    len: usize,
}

// SAFETY: access goes through `slice`, whose caller promises disjoint ranges.
unsafe impl<T: Send> Sync for SharedMut<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Send for SharedMut<T> {}

impl<T> SharedMut<T> {
    pub(crate) fn new(data: &mut [T]) -> Self {
        Self {
            ptr: data.as_mut_ptr(),
            len: data.len(),
        }
    }

    /// Elements `start .. start + len`.
    ///
    /// # Safety
    /// The slice that `new` took is still mutably borrowed, and no other live slice overlaps this.
    #[allow(clippy::mut_from_ref)]
    pub(crate) unsafe fn slice(&self, start: usize, len: usize) -> &mut [T] {
        assert!(start + len <= self.len, "range outside of the slice");
        // SAFETY: in bounds by the assertion, unique by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.add(start), len) }
    }

    /// A pointer to element `start`, for blocks whose rows lie apart. Its use must be disjoint, too.
    pub(crate) fn at(&self, start: usize) -> *mut T {
        assert!(start <= self.len, "start outside of the slice");
        // SAFETY: in bounds by the assertion.
        unsafe { self.ptr.add(start) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once() {
        for threads in [1, 2, 5] {
            let pool = Pool::new(threads);
            for tasks in [0, 1, 2, 3, 100, 1000] {
                let mut hits = vec![0u32; tasks];
                let shared = SharedMut::new(&mut hits);
                pool.run(tasks, |i| {
                    // SAFETY: task `i` alone touches element `i`.
                    unsafe { shared.slice(i, 1)[0] += 1 }
                });
                assert!(hits.iter().all(|&h| h == 1), "{threads} {tasks}");
            }
        }
    }

    #[test]
    fn loops_follow_each_other_and_nest() {
        let pool = Pool::new(3);
        let total = AtomicUsize::new(0);
        for _ in 0..2000 {
            pool.run(4, |_| {
                pool.run(3, |i| {
                    total.fetch_add(i, Ordering::Relaxed);
                });
            });
        }
        assert_eq!(total.into_inner(), 2000 * 4 * 3);
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_lives_on() {
        let pool = Pool::new(2);
        let result = catch_unwind(AssertUnwindSafe(|| {
            pool.run(10, |i| assert!(i != 7, "task seven"));
        }));
        assert!(result.is_err());
        let sum = AtomicUsize::new(0);
        pool.run(10, |i| {
            sum.fetch_add(i, Ordering::Relaxed);
        });
        assert_eq!(sum.into_inner(), 45);
    }

    #[test]
    fn callers_from_several_threads_take_turns() {
        let pool = Pool::new(2);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..200 {
                        let sum = AtomicUsize::new(0);
                        pool.run(10, |i| {
                            sum.fetch_add(i, Ordering::Relaxed);
                        });
                        assert_eq!(sum.into_inner(), 45);
                    }
                });
            }
        });
    }
}
