//! WebSocket through a served gateway, with frames of all sizes.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod support;

use std::net::SocketAddr;

use futures::{SinkExt, StreamExt};
use portcullis::discovery::EmbeddedRegistry;
use tokio::net::{TcpListener, TcpStream};
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;
use tokio_tungstenite::tungstenite::protocol::{CloseFrame, WebSocketConfig};
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream};

/// Larger than any frame here.
fn config() -> WebSocketConfig {
    WebSocketConfig::default().max_message_size(Some(64 << 20)).max_frame_size(Some(64 << 20))
}

/// Sends back every message, and closes as it is closed.
async fn echo() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((io, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut socket = tokio_tungstenite::accept_async_with_config(io, Some(config())).await.unwrap();
                while let Some(Ok(message)) = socket.next().await {
                    if message.is_text() || message.is_binary() {
                        socket.send(message).await.unwrap();
                    }
                }
            });
        }
    });
    address
}

async fn connect() -> (WebSocketStream<MaybeTlsStream<TcpStream>>, impl Sized) {
    let registry = EmbeddedRegistry::new();
    let registrations = support::register(&registry, "orders", [("echo".to_owned(), echo().await)]).await;
    let gateway = support::serve(support::open_gateway(registry).build().unwrap());
    let url = format!("ws://{gateway}/socket?x=1");
    let (socket, response) = tokio_tungstenite::connect_async_with_config(url, Some(config()), false).await.unwrap();
    assert_eq!((response.status().as_u16(), response.headers().get("via").is_some()), (101, true));
    (socket, registrations)
}

#[tokio::test]
async fn frames_up_to_16_mib_come_back_as_they_were() {
    let (mut socket, _running) = connect().await;
    for size in [0, 1, 125, 126, 65_535, 65_536, 1 << 20, 16 << 20] {
        let sent: Vec<u8> = (0..size).map(|at: usize| (at % 251) as u8).collect();
        socket.send(Message::binary(sent.clone())).await.unwrap();
        let came = socket.next().await.unwrap().unwrap();
        assert!(came.into_data() == sent, "{size} bytes");
    }
    socket.send(Message::text("grüße")).await.unwrap();
    assert_eq!(socket.next().await.unwrap().unwrap(), Message::text("grüße"));
}

#[tokio::test]
async fn pings_and_the_closing_handshake_pass() {
    let (mut socket, _running) = connect().await;
    socket.send(Message::Ping("a".into())).await.unwrap();
    assert_eq!(socket.next().await.unwrap().unwrap(), Message::Pong("a".into()));
    let frame = CloseFrame { code: CloseCode::Normal, reason: "done".into() };
    socket.close(Some(frame.clone())).await.unwrap();
    assert_eq!(socket.next().await.unwrap().unwrap(), Message::Close(Some(frame)));
    assert!(socket.next().await.is_none(), "and the connection ends");
}
