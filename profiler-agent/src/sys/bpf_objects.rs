//! The BPF programs and maps that this process holds, as the kernel describes them.

use std::{collections::BTreeSet, fs, path::Path};

/// Lines of `fdinfo` that say what an object is. Source: kernel/bpf/syscall.c: bpf_prog_show_fdinfo,
/// bpf_map_show_fdinfo, bpf_link_show_fdinfo.
const SHOWN: [&str; 15] = [
    "prog_type",
    "prog_jited",
    "prog_tag",
    "prog_id",
    "memlock",
    "run_time_ns",
    "run_cnt",
    "recursion_misses",
    "verified_insns",
    "map_type",
    "key_size",
    "value_size",
    "max_entries",
    "map_id",
    "link_type",
];

/// One line for each program, map and link. Needs no capability, unlike asking the kernel for all there are.
pub(crate) fn listing() -> String {
    listing_of("/proc/self/fdinfo".as_ref())
}

fn listing_of(fdinfo: &Path) -> String {
    let entries = fs::read_dir(fdinfo).into_iter().flatten().flatten();
    // A set, for several descriptors may be of one object.
    let lines: BTreeSet<_> =
        entries.filter_map(|entry| describe(&fs::read_to_string(entry.path()).ok()?)).collect();
    lines.into_iter().map(|line| line + "\n").collect()
}

/// `map_type 2 key_size 4 … memlock 12345 map_id 7`
fn describe(fdinfo: &str) -> Option<String> {
    let fields: Vec<_> = fdinfo
        .lines()
        .filter_map(|line| line.split_once(':'))
        .filter(|(name, _)| SHOWN.contains(name))
        .map(|(name, value)| format!("{name} {}", value.trim()))
        .collect();
    let is_bpf = ["prog_type", "map_type", "link_type"].iter().any(|kind| fdinfo.contains(kind));
    is_bpf.then(|| fields.join(" "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_and_maps_are_listed_and_other_files_are_not() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let map = "pos:\t0\nflags:\t02\nmap_type:\t27\nkey_size:\t0\nmax_entries:\t1048576\nmemlock:\t1062040\nmap_id:\t5\nfrozen:\t0\n";
        let program = "pos:\t0\nprog_type:\t7\nprog_jited:\t1\nmemlock:\t20480\nprog_id:\t9\n";
        for (fd, text) in [("3", "pos:\t0\nflags:\t02\n"), ("4", map), ("5", program), ("6", map)] {
            fs::write(directory.path().join(fd), text).expect("write");
        }
        assert_eq!(
            listing_of(directory.path()),
            "map_type 27 key_size 0 max_entries 1048576 memlock 1062040 map_id 5\n\
             prog_type 7 prog_jited 1 memlock 20480 prog_id 9\n"
        );
    }
}
