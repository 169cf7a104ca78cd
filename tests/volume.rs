//! Large bodies and many connections, in little memory. By default small enough for every day;
//! `PORTCULLIS_STREAM_MIB=1024 PORTCULLIS_CONNECTIONS=10000 cargo test --release --test volume -- --nocapture` for the full
//! measure, which needs `ulimit -n 25000`.

#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on fails")]

mod support;

use std::convert::Infallible;

use bytes::Bytes;
use http::Request;
use http_body_util::BodyExt;
use http_body_util::channel::Channel;
use portcullis::discovery::EmbeddedRegistry;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::Mutex;

const MIB: usize = 1 << 20;

/// The memory is that of the whole process, so one at a time.
static ALONE: Mutex<()> = Mutex::const_new(());

fn number(name: &str, default: usize) -> usize {
    std::env::var(name).map_or(default, |text| text.parse().expect(name))
}

/// What this process holds in memory, in bytes.
fn resident() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<usize>().unwrap() * 1024
}

async fn streams(http2: bool) {
    let _alone = ALONE.lock().await;
    let registry = EmbeddedRegistry::new();
    let backends = support::backends(&["a"]).await;
    let _registrations = support::register(&registry, "orders", support::places(&backends)).await;
    let gateway = support::serve(support::open_gateway(registry).build().unwrap());
    let client = support::client::<Channel<Bytes, Infallible>>(http2);

    let total = number("PORTCULLIS_STREAM_MIB", 48) * MIB;
    let (mut upload, body) = Channel::new(1);
    let request = Request::post(format!("http://{gateway}/echo")).body(body).unwrap();
    let sending = tokio::spawn(async move {
        let chunk = Bytes::from(vec![7; 64 * 1024]);
        for _ in 0..total / chunk.len() {
            upload.send_data(chunk.clone()).await.unwrap();
        }
    });
    let mut download = client.request(request).await.unwrap().into_body();
    let (mut came, mut start, mut most) = (0, 0, 0);
    while let Some(frame) = download.frame().await {
        let Ok(data) = frame.unwrap().into_data() else { continue };
        assert!(data.iter().all(|byte| *byte == 7));
        let before = came / MIB;
        came += data.len();
        if came / MIB > before {
            let now = resident();
            // Buffers have grown to their size by then.
            if came <= 16 * MIB {
                start = now;
            }
            most = most.max(now);
        }
    }
    sending.await.unwrap();
    assert_eq!(came, total);
    println!("HTTP/2: {http2}: {} MiB up and down; {} MiB, then at most {}", total / MIB, start / MIB, most / MIB);
    assert!(most < start + 16 * MIB, "{start} -> {most}");
}

#[tokio::test]
async fn a_large_body_streams_up_and_down_in_flat_memory_over_http1() {
    streams(false).await;
}

#[tokio::test]
async fn a_large_body_streams_up_and_down_in_flat_memory_over_http2() {
    streams(true).await;
}

#[tokio::test]
async fn idle_connections_cost_little_and_stay_usable() {
    let _alone = ALONE.lock().await;
    let registry = EmbeddedRegistry::new();
    let backends = support::backends(&["a"]).await;
    let _registrations = support::register(&registry, "orders", support::places(&backends)).await;
    let gateway = support::serve(support::open_gateway(registry).build().unwrap());
    let count = number("PORTCULLIS_CONNECTIONS", 500);
    let ask = async |io: &mut TcpStream| {
        io.write_all(b"GET /status/204 HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
        let mut answer = Vec::new();
        while !answer.ends_with(b"\r\n\r\n") {
            assert!(io.read_buf(&mut answer).await.unwrap() > 0, "closed");
        }
        assert!(answer.starts_with(b"HTTP/1.1 204 "));
    };
    let mut open = vec![TcpStream::connect(gateway).await.unwrap()];
    ask(&mut open[0]).await;
    let before = resident();
    for _ in 1..count {
        let mut io = TcpStream::connect(gateway).await.unwrap();
        ask(&mut io).await;
        open.push(io);
    }
    let each = resident().saturating_sub(before) / count;
    println!("{count} idle connections, {each} bytes each, both ends");
    assert!(each < 32 * 1024, "{each} bytes each");
    for io in &mut open {
        ask(io).await;
    }
}
