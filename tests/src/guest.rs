//! Tiny guests.
