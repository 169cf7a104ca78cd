//! The same bytes in, the same bytes out, behind the façade's server.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]

mod cases;

use std::net::SocketAddr;

use portcullis::serve::Server;
use portcullis_forward::Forward;
use tokio::net::TcpStream;
use tokio::task::JoinHandle;

/// A server that runs a forward.
pub(crate) struct Front {
    address: SocketAddr,
    served: JoinHandle<std::io::Result<()>>,
}

impl Front {
    /// Whether hyper alone reads what clients send.
    pub(crate) const IS_HYPER: bool = false;

    pub(crate) fn start(forward: &Forward) -> Self {
        let server = Server::bind(([127, 0, 0, 1], 0)).unwrap();
        Self { address: server.local_addr().unwrap(), served: tokio::spawn(server.serve(forward.clone())) }
    }

    /// Where it listens.
    pub(crate) async fn listen(&self) -> SocketAddr {
        self.address
    }

    /// A client's connection to it, and what is done when it is over.
    pub(crate) async fn connect(&self) -> (TcpStream, JoinHandle<()>) {
        (TcpStream::connect(self.address).await.unwrap(), tokio::spawn(async {}))
    }
}

impl Drop for Front {
    fn drop(&mut self) {
        self.served.abort();
    }
}
