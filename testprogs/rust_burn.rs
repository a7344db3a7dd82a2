//! Stack `main` -> `rust_outer` -> `rust_hot` with frame pointers, and a closure that is inlined into `rust_hot`. Ends
//! after the given seconds, or when the pipe on standard input closes.

use std::{
    env, fs,
    hint::black_box,
    io::{self, Read as _},
    os::unix::fs::FileTypeExt as _,
    process, thread,
    time::{Duration, Instant},
};

#[inline(never)]
fn rust_hot(start: u64, rounds: u64) -> u64 {
    let step = |x: u64| x.wrapping_mul(6364136223846793005).rotate_left(17);
    (0..rounds).fold(start, |x, _| black_box(step(x)))
}

/// About 1 ms.
#[inline(never)]
fn rust_outer(start: u64) -> u64 {
    // Not the last thing done, so that the call keeps this frame.
    rust_hot(start, 500_000) ^ black_box(1)
}

fn exit_at_end_of_input() {
    let is_pipe = fs::metadata("/proc/self/fd/0").is_ok_and(|input| input.file_type().is_fifo());
    if is_pipe {
        thread::spawn(|| {
            let _ = io::stdin().read_to_end(&mut Vec::new());
            process::exit(0)
        });
    }
}

fn main() {
    let seconds = env::args().nth(1).map(|argument| argument.parse().expect("SECONDS is a number"));
    let end = seconds.map(|seconds| Instant::now() + Duration::from_secs_f64(seconds));
    exit_at_end_of_input();
    println!("ready");
    let mut x = 1;
    while end.is_none_or(|end| Instant::now() < end) {
        x = rust_outer(x);
    }
}
