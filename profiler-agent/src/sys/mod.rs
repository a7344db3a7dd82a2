//! Raw system calls and kernel formats. With `profiler-ebpf`, the only place where `unsafe` lives.

pub(crate) mod bpf;
pub(crate) mod bpf_objects;
pub(crate) mod btf;
pub(crate) mod capabilities;
pub(crate) mod cgroup;
pub(crate) mod clock;
pub(crate) mod cpu;
pub(crate) mod file_map;
pub(crate) mod file_pages;
pub(crate) mod heap;
pub(crate) mod hold;
pub(crate) mod limits;
pub(crate) mod loading;
pub(crate) mod memory;
pub(crate) mod page;
pub(crate) mod page_cache;
pub(crate) mod perf_event;
pub(crate) mod perf_record;
pub(crate) mod perf_ring;
pub(crate) mod probed;
pub(crate) mod random;
pub(crate) mod seccomp;
pub(crate) mod sigbus;
pub(crate) mod threads;
pub(crate) mod uprobe_event;
pub(crate) mod usage;
