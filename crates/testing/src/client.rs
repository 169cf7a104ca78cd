//! A client for one request, without a pool.

use std::net::SocketAddr;

use bytes::Bytes;
use http::{HeaderMap, Method, Request, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;

/// What came back, read to its end.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Answer {
    /// The status.
    pub status: StatusCode,
    /// The headers.
    pub headers: HeaderMap,
    /// The body.
    pub body: Bytes,
    /// The trailers, if any.
    pub trailers: Option<HeaderMap>,
}

/// Why nothing came back.
pub type Error = Box<dyn std::error::Error + Send + Sync>;

impl Answer {
    /// The body as text.
    #[must_use]
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// The body as JSON; null when it is none.
    #[must_use]
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.body).unwrap_or_default()
    }

    /// A header as text; empty when there is none.
    #[must_use]
    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default()
    }
}

/// Sends one HTTP/1.1 request on a connection of its own.
///
/// # Errors
///
/// When the connection fails or the answer breaks off.
pub async fn request(
    to: SocketAddr,
    method: Method,
    target: &str,
    headers: &[(&str, &str)],
    body: impl Into<Bytes>,
) -> Result<Answer, Error> {
    let mut request = Request::builder().method(method).uri(target).header("host", to.to_string());
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    send(to, request.body(Full::new(body.into()))?).await
}

/// Sends one `GET` on a connection of its own.
///
/// # Errors
///
/// When the connection fails or the answer breaks off.
pub async fn get(to: SocketAddr, target: &str, headers: &[(&str, &str)]) -> Result<Answer, Error> {
    request(to, Method::GET, target, headers, "").await
}

async fn send(to: SocketAddr, request: Request<Full<Bytes>>) -> Result<Answer, Error> {
    let stream = TcpStream::connect(to).await?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    let connection = tokio::spawn(connection);
    let (head, body) = sender.send_request(request).await?.into_parts();
    let body = body.collect().await?;
    drop(sender);
    connection.abort();
    let trailers = body.trailers().cloned();
    Ok(Answer { status: head.status, headers: head.headers, body: body.to_bytes(), trailers })
}
