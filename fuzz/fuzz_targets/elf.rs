//! Any bytes as an ELF file that a process runs: what its headers say lies where it says, or is left out.
#![no_main]

#[path = "../../profiler-agent/src/addr.rs"]
#[allow(dead_code, reason = "the agent uses all of it")]
mod addr;
#[path = "."]
#[allow(dead_code, reason = "the agent uses all of it")]
mod executable {
    #[path = "../../profiler-agent/src/executable/bounded.rs"]
    mod bounded;
    #[path = "../../profiler-agent/src/executable/build_id.rs"]
    mod build_id;
    #[path = "../../profiler-agent/src/executable/elf.rs"]
    pub(crate) mod elf;
}
#[path = "."]
mod sys {
    #[path = "../../profiler-agent/src/sys/page.rs"]
    #[allow(dead_code, reason = "the agent uses all of it")]
    pub(crate) mod page;
}

use std::{cell::OnceCell, fs::File, os::unix::fs::FileExt as _};

use executable::elf::Elf;
use libfuzzer_sys::fuzz_target;
use rustix::fs::{MemfdFlags, memfd_create};

thread_local! {
    static FILE: OnceCell<File> = const { OnceCell::new() };
}

fuzz_target!(|bytes: &[u8]| {
    FILE.with(|file| {
        let file = file
            .get_or_init(|| File::from(memfd_create("elf", MemfdFlags::CLOEXEC).expect("a file in memory")));
        file.set_len(bytes.len() as u64).expect("room for it");
        file.write_all_at(bytes, 0).expect("room for it");
        let Ok(elf) = Elf::of(file) else { return };
        for offset in [0, 0x1000, bytes.len() as u64, u64::MAX] {
            let _ = elf.segments.elf_addr(addr::FileOffset(offset));
        }
        if let Some((code, at)) = elf.segments.code_range() {
            assert!(code.start <= code.end);
            let _ = elf.segments.elf_addr(at);
        }
        for table in &elf.symbols.tables {
            assert!(table.symbols.start <= table.symbols.end && table.strings.start <= table.strings.end);
        }
    });
});
