//! Tables of small files that the tests write themselves.

mod elf_file;
mod properties;
mod table;
