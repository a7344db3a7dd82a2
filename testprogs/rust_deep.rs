//! Rust as it is released, without frame pointers: `main` and a thread each run boxed closures that sort by key and walk
//! a map, down to `weigh`. Ends when the pipe on standard input closes.

use std::{
    collections::BTreeMap,
    env, fs,
    hint::black_box,
    io::{self, Read as _},
    os::unix::fs::FileTypeExt as _,
    process, thread,
};

type Job = Box<dyn Fn(u64) -> u64 + Send>;

#[inline(never)]
fn weigh(value: u64) -> u64 {
    (0..200).fold(value, |x, _| black_box(x.wrapping_mul(6364136223846793005).rotate_left(17)))
}

#[inline(never)]
fn sorted(seed: u64) -> u64 {
    let mut values: Vec<u64> = (0..100).map(|at| at ^ seed).collect();
    values.sort_by_key(|&value| weigh(value));
    values[50] ^ black_box(1)
}

#[inline(never)]
fn mapped(seed: u64) -> u64 {
    let map: BTreeMap<u64, u64> = (0..100).map(|at| (weigh(at ^ seed), at)).collect();
    map.values().fold(0, |sum, &value| sum ^ weigh(value))
}

#[inline(never)]
fn run(jobs: &[Job]) -> u64 {
    let mut x = 1;
    loop {
        for job in jobs {
            x ^= job(x);
        }
        if black_box(x) == u64::MAX && env::args().count() > 1000 {
            return x;
        }
    }
}

fn jobs() -> Vec<Job> {
    vec![Box::new(sorted), Box::new(|seed| mapped(seed) ^ black_box(2))]
}

fn main() {
    if fs::metadata("/proc/self/fd/0").is_ok_and(|input| input.file_type().is_fifo()) {
        thread::spawn(|| {
            let _ = io::stdin().read_to_end(&mut Vec::new());
            process::exit(0)
        });
    }
    thread::spawn(|| run(&jobs()));
    println!("ready");
    run(&jobs());
}
