//! The backend from outside: over HTTP, through restarts and through sudden death.

mod api;
mod common;
mod durable;
