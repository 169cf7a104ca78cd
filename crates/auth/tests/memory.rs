//! Distinct tokens, many of them: what is remembered stays within its bound, by the process's own account.
//!
//! `PORTCULLIS_TOKENS` says how many (30 000 without it); the long run is
//! `PORTCULLIS_TOKENS=10000000 cargo test --release -p portcullis-auth --test memory -- --nocapture`.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod support;

use portcullis_auth::{Algorithm, Jwt};
use serde_json::json;
use support::{NOW, Signer, ask, wall};

/// What is not the cache's: the allocator's slack, and the code as it is paged in.
const SLACK: usize = 6 << 20;

fn resident() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").trim().parse::<usize>().unwrap() * 1024
}

#[test]
fn tokens_stay_within_the_memory_they_were_given() {
    let tokens: u64 = std::env::var("PORTCULLIS_TOKENS").map_or(30_000, |count| count.parse().unwrap());
    let signer = Signer::new(Algorithm::HS256);
    for bytes in [4 << 20, 16 << 20] {
        let jwt = Jwt::new(signer.key_set("a")).wall_clock(wall()).cache_bytes(bytes);
        let before = resident();
        let mut most = 0;
        for n in 0..tokens {
            let claims = json!({
                "sub": format!("subject-{n}"), "exp": NOW + 600, "scope": "orders:read orders:write",
                "roles": ["clerk"], "tenant": {"id": n, "name": "acme"},
            });
            assert!(ask(&jwt, &signer.sign(&claims)).is_ok());
            if n % 10_000 == 9_999 {
                most = most.max(resident().saturating_sub(before));
            }
        }
        eprintln!("{tokens} tokens, {bytes} bytes for them: the process grew by at most {most}");
        assert!(most <= bytes + SLACK, "grew by {most}");
    }
}
