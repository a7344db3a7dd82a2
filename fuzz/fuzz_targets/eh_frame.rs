//! Any bytes as an ELF file: a table, if there is one, is sorted, disjoint and covers its code, and the step takes any
//! of its rules over any stack. Seeds: small shared libraries and vDSO images.
#![no_main]

use libfuzzer_sys::fuzz_target;
use profiler_common::unwind::{Block, ReadUser, UnwindRule, aarch64, x86_64};
use profiler_unwind::{Architecture, UnwindTable, from_elf};

fuzz_target!(|bytes: &[u8]| {
    let Ok(table) = from_elf(bytes) else { return };
    check_rows(&table);
    for (address, rule) in table.rows().take(1000) {
        step(table.architecture(), &rule, address);
    }
});

fn check_rows(table: &UnwindTable) {
    let mut last = None;
    for (address, rule) in table.rows() {
        assert!(last.is_none_or(|last| last < address), "{last:x?} before {address:x}");
        assert_eq!(table.find(address), Some(&rule), "{address:x}");
        last = Some(address);
    }
    for directory in table.directories() {
        assert!(directory.addresses.is_empty() || table.find(directory.addresses.start).is_some());
        assert!(directory.addresses.is_empty() || table.find(directory.addresses.end - 1).is_some());
    }
}

/// Memory in which every word is its address.
struct Memory {
    block: Block,
}

impl ReadUser for Memory {
    fn read_u64(&mut self, addr: u64) -> Option<u64> {
        Some(addr)
    }

    fn read_block64(&mut self, addr: u64) -> Option<&Block> {
        self.block = std::array::from_fn(|at| addr.wrapping_add(at as u64 * 8));
        Some(&self.block)
    }
}

fn step(architecture: Architecture, rule: &UnwindRule, address: u64) {
    let mut memory = Memory { block: [0; 8] };
    match architecture {
        Architecture::X86_64 => {
            let mut regs = x86_64::Regs { ip: address, exact: 1, gpr: [address; 16] };
            x86_64::step(rule, &mut regs, &mut memory);
        }
        Architecture::Aarch64 => {
            let mut regs = aarch64::Regs { ip: address, exact: 1, sp: address, fp: address, lr: address };
            aarch64::step(rule, &mut regs, &mut memory);
        }
    }
}
