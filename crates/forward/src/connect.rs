//! Opens connections.

use std::future::Future;
use std::io;
use std::net::{SocketAddr, ToSocketAddrs};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures::stream::{FuturesUnordered, StreamExt};
use portcullis_core::{Address, Instance, Scheme};
use tokio::net::TcpStream;
#[cfg(unix)]
use tokio::net::UnixStream;
use tokio::sync::watch;
use tokio::time::sleep;

use crate::failure::{Failure, Kind};
use crate::stream::Stream;

/// How long one address of a name has for itself before the next is tried beside it
/// ([RFC 8305](https://www.rfc-editor.org/rfc/rfc8305)).
const STAGGER: Duration = Duration::from_millis(250);
const MOST_ADDRESSES: usize = 16;

/// A new connection, and whether the two ends agreed on HTTP/2.
pub(crate) struct Dialed {
    pub(crate) stream: Stream,
    pub(crate) h2: bool,
}

/// Looks up the name of one endpoint, once for all who want to connect to it: a lookup that nobody answers occupies a thread
/// for many seconds, whether anybody still waits for it or not.
#[derive(Default)]
pub(crate) struct Lookup(Arc<Mutex<Option<watch::Receiver<Found>>>>);

/// Nothing yet, the addresses, or why there are none.
type Found = Option<Result<Vec<SocketAddr>, Arc<io::Error>>>;

/// Connects to `instance`. `h2` is what it is known to speak, if that is known; without TLS it decides.
pub(crate) async fn dial(
    instance: &Instance,
    h2: Option<bool>,
    lookup: &Lookup,
    #[cfg(feature = "tls")] tls: Option<&crate::tls::ClientTls>,
) -> Result<Dialed, Failure> {
    let failed = |error: io::Error| Failure::unsent(Kind::Connect).because(&error);
    let (stream, h2) = match instance.scheme {
        #[cfg(feature = "tls")]
        Scheme::Https => {
            let plain = plain(&instance.address, lookup).await.map_err(failed)?;
            let missing = || Failure::unsent(Kind::Tls).because(&"no TLS is set up for upstreams");
            let stream = tls.ok_or_else(missing)?.connect(&instance.address, plain, h2).await?;
            let agreed = stream.get_ref().1.alpn_protocol() == Some(b"h2");
            (Stream::Tls(Box::new(stream)), agreed)
        }
        #[cfg(not(feature = "tls"))]
        Scheme::Https => return Err(Failure::unsent(Kind::Tls).because(&"built without TLS")),
        _ => {
            let stream = match &instance.address {
                #[cfg(unix)]
                Address::Unix(path) => Stream::Unix(UnixStream::connect(path).await.map_err(failed)?),
                address => Stream::Tcp(tcp(address, lookup).await.map_err(failed)?),
            };
            (stream, h2.unwrap_or(false))
        }
    };
    Ok(Dialed { stream, h2 })
}

#[cfg(feature = "tls")]
async fn plain(address: &Address, lookup: &Lookup) -> io::Result<crate::stream::Plain> {
    Ok(match address {
        #[cfg(unix)]
        Address::Unix(path) => crate::stream::Plain::Unix(UnixStream::connect(path).await?),
        address => crate::stream::Plain::Tcp(tcp(address, lookup).await?),
    })
}

async fn tcp(address: &Address, lookup: &Lookup) -> io::Result<TcpStream> {
    let stream = match address {
        Address::Socket(address) => TcpStream::connect(address).await?,
        Address::Name(host, port) => {
            happy_eyeballs(interleave(lookup.addresses(host, *port).await?), TcpStream::connect).await?
        }
        _ => return Err(io::ErrorKind::Unsupported.into()),
    };
    stream.set_nodelay(true)?;
    Ok(stream)
}

// === impl Lookup ===

impl Lookup {
    async fn addresses(&self, host: &Arc<str>, port: u16) -> io::Result<Vec<SocketAddr>> {
        let mut found = self.begin(host, port);
        let answer = found.wait_for(Option::is_some).await.map(|found| found.clone());
        match answer {
            Ok(Some(Ok(addresses))) => Ok(addresses),
            Ok(Some(Err(error))) => Err(io::Error::new(error.kind(), error)),
            Ok(None) | Err(_) => Err(io::Error::other("the lookup of the name was given up")),
        }
    }

    /// The lookup that is under way, or a new one.
    fn begin(&self, host: &Arc<str>, port: u16) -> watch::Receiver<Found> {
        let mut under_way = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // One that was dropped, with its runtime, tells nobody.
        if let Some(found) = &*under_way
            && found.has_changed().is_ok()
        {
            return found.clone();
        }
        let (tell, found) = watch::channel(None);
        *under_way = Some(found.clone());
        drop(under_way);
        let (host, under_way) = (host.clone(), self.0.clone());
        tokio::task::spawn_blocking(move || {
            let addresses = (&*host, port).to_socket_addrs().map(|found| found.take(MOST_ADDRESSES).collect());
            // Who comes from now on wants to know what is true then.
            *under_way.lock().unwrap_or_else(PoisonError::into_inner) = None;
            tell.send_replace(Some(addresses.map_err(Arc::new)));
        });
        found
    }
}

/// Families in turn, beginning with that of the first.
fn interleave(addresses: Vec<SocketAddr>) -> Vec<SocketAddr> {
    let first = addresses.first().is_some_and(SocketAddr::is_ipv6);
    let (mut a, mut b): (Vec<_>, Vec<_>) = addresses.into_iter().partition(|address| address.is_ipv6() == first);
    a.reverse();
    b.reverse();
    let mut mixed = Vec::with_capacity(a.len() + b.len());
    while let Some(next) = a.pop() {
        mixed.push(next);
        std::mem::swap(&mut a, &mut b);
        if a.is_empty() {
            std::mem::swap(&mut a, &mut b);
        }
    }
    mixed
}

/// The first to answer wins; the next is tried when one has failed or had its time.
async fn happy_eyeballs<F, T>(addresses: Vec<SocketAddr>, connect: impl Fn(SocketAddr) -> F) -> io::Result<T>
where
    F: Future<Output = io::Result<T>>,
{
    let mut rest = addresses.into_iter();
    let mut error = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    let mut attempts = FuturesUnordered::new();
    loop {
        if let Some(address) = rest.next() {
            attempts.push(connect(address));
        } else if attempts.is_empty() {
            return Err(error);
        }
        let stagger = async {
            if rest.len() == 0 {
                std::future::pending().await
            } else {
                sleep(STAGGER).await;
            }
        };
        tokio::select! {
            biased;
            Some(result) = attempts.next() => match result {
                Ok(stream) => return Ok(stream),
                Err(failed) => error = failed,
            },
            () = stagger => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn families_take_turns() {
        let address = |text: &str| text.parse::<SocketAddr>().unwrap();
        let (a1, a2, a3, b1) = (address("[::1]:1"), address("[::2]:1"), address("[::3]:1"), address("127.0.0.1:1"));
        assert_eq!(interleave(vec![a1, a2, a3, b1]), [a1, b1, a2, a3]);
        assert_eq!(interleave(vec![b1, a1]), [b1, a1]);
        assert_eq!(interleave(vec![]), []);
    }

    #[tokio::test]
    async fn an_address_nobody_listens_on_is_passed_over() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let good = listener.local_addr().unwrap();
        let closed = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let bad = closed.local_addr().unwrap();
        drop(closed);
        let stream = happy_eyeballs(vec![bad, good], TcpStream::connect).await.unwrap();
        assert_eq!(stream.peer_addr().unwrap(), good);
        assert!(happy_eyeballs(vec![bad, bad], TcpStream::connect).await.is_err());
        assert!(happy_eyeballs(vec![], TcpStream::connect).await.is_err());
    }

    #[tokio::test(start_paused = true)]
    async fn an_address_that_does_not_answer_has_a_quarter_of_a_second_for_itself() {
        let address = |port| SocketAddr::from(([127, 0, 0, 1], port));
        let began = tokio::time::Instant::now();
        let connect = |address: SocketAddr| async move {
            match address.port() {
                1 => std::future::pending().await,
                2 => sleep(Duration::from_secs(1)).await,
                _ => {}
            }
            Ok(address.port())
        };
        let all = (1..=3).map(address).collect();
        assert_eq!(happy_eyeballs(all, connect).await.unwrap(), 3);
        assert_eq!(began.elapsed(), STAGGER * 2);
        assert_eq!(
            happy_eyeballs(vec![address(2), address(1)], connect).await.unwrap(),
            2,
            "the first is still waited for"
        );
    }
}
