//! One stream of HTTP/2 to an endpoint, seen from its other end.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use h2::server::{Connection, SendResponse};
use h2::{Reason, RecvStream};
use http::{HeaderValue, Request, Response};
use http_body::Frame;
use http_body_util::{BodyExt, Channel, Empty, Full, StreamBody};
use portcullis_core::{Address, Instance, Protocol, Rejection};
use portcullis_forward::{Edit, Forward, Policy};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tower::ServiceExt;

use super::{LONG, Upstream, pass, within};

/// The other end of a connection, which goes on as long as it is asked for something.
type End = Connection<TcpStream, Bytes>;

/// How much a stream may send before more is asked for, and of how much there is room for none but itself.
const WINDOW: u32 = 100;

fn forward(upstream: &Upstream) -> Forward {
    let mut instance = Instance::new("1", Address::Socket(upstream.address()));
    instance.protocol = Protocol::Http2;
    Forward::to_instance(instance)
}

async fn accept(upstream: &Upstream) -> End {
    let io = upstream.accept().await.io;
    within(h2::server::Builder::new().initial_window_size(WINDOW).handshake(io)).await.unwrap()
}

async fn next(end: &mut End) -> (Request<RecvStream>, SendResponse<Bytes>) {
    within(end.accept()).await.unwrap().unwrap()
}

/// What is asked of a stream while its connection goes on.
async fn along<F: Future>(end: &mut End, asked: F) -> F::Output {
    within(async {
        tokio::select! {
            biased;
            answer = asked => answer,
            none = end.accept() => panic!("the connection ended, or another stream began: {}", none.is_some()),
        }
    })
    .await
}

fn post<B>(body: B) -> Request<B> {
    Request::post("http://a/").body(body).unwrap()
}

fn rejection<B>(response: &Response<B>) -> (u16, &str, bool) {
    let rejection = response.extensions().get::<Rejection>().unwrap();
    (rejection.status().as_u16(), rejection.reason(), rejection.sent())
}

#[tokio::test]
async fn a_request_goes_on_after_its_answer_has_begun_though_nobody_reads_it() {
    let upstream = Upstream::bind().await;
    let forward = forward(&upstream);
    let (mut caller, body) = Channel::<Bytes, Infallible>::new(4);
    let call = tokio::spawn(forward.clone().oneshot(post(body)));
    let mut end = accept(&upstream).await;
    let (request, mut respond) = next(&mut end).await;
    let mut answer = respond.send_response(Response::new(()), false).unwrap();
    let response = along(&mut end, call).await.unwrap().unwrap();
    assert_eq!(response.status(), 200);
    let mut stream = request.into_body();
    for text in ["one", "two"] {
        caller.send_data(text.into()).await.unwrap();
        assert_eq!(along(&mut end, stream.data()).await.unwrap().unwrap(), text);
    }
    caller
        .send_trailers([("x-sum", "7")].iter().map(|(n, v)| (n.parse().unwrap(), v.parse().unwrap())).collect())
        .await
        .unwrap();
    drop(caller);
    assert!(along(&mut end, stream.data()).await.is_none());
    assert_eq!(along(&mut end, stream.trailers()).await.unwrap().unwrap()["x-sum"], "7");
    answer.send_data("ok".into(), true).unwrap();
    assert_eq!(along(&mut end, response.into_body().collect()).await.unwrap().to_bytes(), "ok");
}

#[tokio::test]
async fn what_is_given_up_is_cancelled() {
    let upstream = Upstream::bind().await;
    let forward = forward(&upstream);
    let (_caller, body) = Channel::<Bytes, Infallible>::new(1);
    let call = tokio::spawn(forward.clone().oneshot(post(body)));
    let mut end = accept(&upstream).await;
    // Before its answer.
    let (request, mut respond) = next(&mut end).await;
    call.abort();
    assert_eq!(along(&mut end, std::future::poll_fn(|cx| respond.poll_reset(cx))).await.unwrap(), Reason::CANCEL);
    assert!(request.into_body().data().await.unwrap().is_err());
    // In the middle of its answer.
    let call = tokio::spawn(forward.clone().oneshot(post(Empty::<Bytes>::new())));
    let (_request, mut respond) = next(&mut end).await;
    let mut answer = respond.send_response(Response::new(()), false).unwrap();
    answer.send_data("half".into(), false).unwrap();
    let mut response = along(&mut end, call).await.unwrap().unwrap();
    assert_eq!(along(&mut end, response.frame()).await.unwrap().unwrap().into_data().unwrap(), "half");
    drop(response);
    assert_eq!(along(&mut end, std::future::poll_fn(|cx| answer.poll_reset(cx))).await.unwrap(), Reason::CANCEL);
}

/// Though nobody takes what is left of the request, so that nothing else would show it.
#[tokio::test]
async fn who_gives_up_an_answer_gives_up_the_rest_of_the_request() {
    let upstream = Upstream::bind().await;
    let forward = forward(&upstream);
    let (mut caller, body) = Channel::<Bytes, Infallible>::new(1);
    let call = tokio::spawn(forward.clone().oneshot(post(body)));
    let mut end = accept(&upstream).await;
    let (_request, mut respond) = next(&mut end).await;
    caller.send_data(vec![0; 1000].into()).await.unwrap();
    let mut answer = respond.send_response(Response::new(()), false).unwrap();
    drop(along(&mut end, call).await.unwrap().unwrap());
    assert_eq!(along(&mut end, std::future::poll_fn(|cx| answer.poll_reset(cx))).await.unwrap(), Reason::CANCEL);
}

/// As one who watches has asked once and only listens.
#[tokio::test(start_paused = true)]
async fn what_moves_in_one_direction_does_not_stand_still() {
    // Time goes on only when it is told to.
    let busy = tokio::spawn(async {
        loop {
            tokio::task::yield_now().await;
        }
    });
    let upstream = Upstream::bind().await;
    let idle = Duration::from_secs(300);
    let forward = forward(&upstream).idle_timeout(idle);
    let (mut caller, body) = Channel::<Bytes, Infallible>::new(1);
    let call = tokio::spawn(forward.clone().oneshot(post(body)));
    let mut end = accept(&upstream).await;
    let (request, mut respond) = next(&mut end).await;
    let mut answer = respond.send_response(Response::new(()), false).unwrap();
    let mut response = along(&mut end, call).await.unwrap().unwrap().into_body();
    for _ in 0..5 {
        tokio::time::advance(idle * 2 / 3).await;
        answer.send_data("news".into(), false).unwrap();
        assert_eq!(along(&mut end, response.frame()).await.unwrap().unwrap().into_data().unwrap(), "news");
    }
    let mut stream = request.into_body();
    for _ in 0..5 {
        tokio::time::advance(idle * 2 / 3).await;
        caller.send_data("more".into()).await.unwrap();
        assert_eq!(along(&mut end, stream.data()).await.unwrap().unwrap(), "more");
        assert!(tokio_test::task::spawn(response.frame()).poll().is_pending());
    }
    busy.abort();
}

/// Its other end may be gone, and nothing says so.
#[tokio::test]
async fn a_connection_that_has_gone_silent_gets_no_other_request() {
    let upstream = Upstream::bind().await;
    let forward = forward(&upstream).response_timeout(Duration::from_secs(2));
    let ask = || tokio::spawn(forward.clone().oneshot(post(Empty::<Bytes>::new())));
    let mut silent = {
        let call = ask();
        let mut end = accept(&upstream).await;
        let (_request, mut respond) = next(&mut end).await;
        respond.send_response(Response::new(()), true).unwrap();
        assert_eq!(along(&mut end, call).await.unwrap().unwrap().status(), 200);
        end
    };
    assert_eq!(rejection(&within(ask()).await.unwrap().unwrap()), (504, "response-timeout", true));
    let call = ask();
    let mut end = accept(&upstream).await;
    let (_request, mut respond) = next(&mut end).await;
    respond.send_response(Response::new(()), true).unwrap();
    assert_eq!(along(&mut end, call).await.unwrap().unwrap().status(), 200);
    silent.abrupt_shutdown(Reason::NO_ERROR);
}

#[tokio::test]
async fn a_body_that_breaks_off_is_no_whole_one_for_the_endpoint() {
    let upstream = Upstream::bind().await;
    let forward = forward(&upstream);
    let (mut caller, body) = Channel::<Bytes, std::io::Error>::new(1);
    let call = tokio::spawn(forward.clone().oneshot(post(body)));
    let mut end = accept(&upstream).await;
    let (request, _respond) = next(&mut end).await;
    let mut stream = request.into_body();
    caller.send_data("half".into()).await.unwrap();
    assert_eq!(along(&mut end, stream.data()).await.unwrap().unwrap(), "half");
    caller.abort(std::io::ErrorKind::BrokenPipe.into());
    let error = along(&mut end, stream.data()).await.unwrap().unwrap_err();
    assert_eq!(error.reason(), Some(Reason::INTERNAL_ERROR));
    let response = along(&mut end, call).await.unwrap().unwrap();
    assert_eq!(rejection(&response), (400, "request-broken", true));
}

#[tokio::test]
async fn a_body_is_asked_for_no_more_than_the_endpoint_takes() {
    let upstream = Upstream::bind().await;
    let forward = forward(&upstream);
    let (mut caller, body) = Channel::<Bytes, Infallible>::new(1);
    let call = tokio::spawn(forward.clone().oneshot(post(body)));
    let mut end = accept(&upstream).await;
    let (request, mut respond) = next(&mut end).await;
    let mut stream = request.into_body();
    let frame = || Bytes::from(vec![b'x'; WINDOW as usize + 1]);
    // One that has gone but for a byte, and one in the channel.
    for _ in 0..2 {
        along(&mut end, caller.send_data(frame())).await.unwrap();
    }
    let first = along(&mut end, stream.data()).await.unwrap().unwrap();
    assert_eq!(first.len(), WINDOW as usize);
    for _ in 0..100 {
        along(&mut end, tokio::task::yield_now()).await;
    }
    assert!(caller.try_send(Frame::data(frame())).is_err(), "asked for more than there was room for");
    drop(caller);
    let mut read = first.len();
    stream.flow_control().release_capacity(first.len()).unwrap();
    while let Some(data) = along(&mut end, stream.data()).await {
        let count = data.unwrap().len();
        read += count;
        stream.flow_control().release_capacity(count).unwrap();
    }
    assert_eq!(read, 2 * frame().len());
    respond.send_response(Response::new(()), true).unwrap();
    assert_eq!(along(&mut end, call).await.unwrap().unwrap().status(), 200);
}

#[tokio::test]
async fn a_small_body_is_over_for_its_caller_before_there_is_room_for_it() {
    let upstream = Upstream::bind().await;
    let forward = forward(&upstream);
    let text = "x".repeat(WINDOW as usize + 1);
    let call = tokio::spawn(forward.clone().oneshot(post(Full::<Bytes>::from(text.clone()))));
    let mut end = accept(&upstream).await;
    let (request, mut respond) = next(&mut end).await;
    assert_eq!(request.headers()["content-length"], text.len().to_string());
    let mut stream = request.into_body();
    let mut read = Vec::new();
    while let Some(data) = along(&mut end, stream.data()).await {
        let data = data.unwrap();
        stream.flow_control().release_capacity(data.len()).unwrap();
        read.extend_from_slice(&data);
    }
    assert_eq!(read, text.as_bytes());
    respond.send_response(Response::new(()), true).unwrap();
    assert_eq!(along(&mut end, call).await.unwrap().unwrap().status(), 200);
}

#[tokio::test]
async fn an_answer_that_is_given_early_is_whole() {
    let upstream = Upstream::bind().await;
    let forward = forward(&upstream);
    let (_caller, body) = Channel::<Bytes, Infallible>::new(1);
    let call = tokio::spawn(forward.clone().oneshot(post(body)));
    let mut end = accept(&upstream).await;
    let (request, mut respond) = next(&mut end).await;
    let mut answer = respond.send_response(Response::new(()), false).unwrap();
    answer.send_data("enough".into(), true).unwrap();
    // It wants no more of the request, and says so behind its answer.
    drop((request, respond, answer));
    let collected = along(&mut end, async { call.await.unwrap().unwrap().into_body().collect().await });
    assert_eq!(collected.await.unwrap().to_bytes(), "enough");
}

#[tokio::test]
async fn an_answer_that_is_reset_before_its_end_is_not_whole_whatever_is_said_of_it() {
    let announced = Response::builder().header("content-length", "100").body(()).unwrap();
    for head in [announced, Response::new(())] {
        let upstream = Upstream::bind().await;
        let forward = forward(&upstream);
        let (_caller, body) = Channel::<Bytes, Infallible>::new(1);
        let call = tokio::spawn(forward.clone().oneshot(post(body)));
        let mut end = accept(&upstream).await;
        let (_request, mut respond) = next(&mut end).await;
        let mut answer = respond.send_response(head, false).unwrap();
        answer.send_data("enough".into(), false).unwrap();
        let mut body = along(&mut end, call).await.unwrap().unwrap().into_body();
        let first = along(&mut end, body.frame()).await.unwrap().unwrap();
        assert_eq!(first.into_data().unwrap(), "enough");
        answer.send_reset(Reason::NO_ERROR);
        assert!(along(&mut end, body.frame()).await.unwrap().is_err());
    }
}

#[tokio::test]
async fn what_goes_on_after_its_answer_is_given_up_when_it_stands_still_or_has_had_its_time() {
    for limited in [Forward::idle_timeout, Forward::total_timeout] {
        let upstream = Upstream::bind().await;
        let forward = limited(forward(&upstream), LONG);
        let (mut caller, body) = Channel::<Bytes, Infallible>::new(1);
        let call = tokio::spawn(forward.clone().oneshot(post(body)));
        let mut end = accept(&upstream).await;
        let (request, mut respond) = next(&mut end).await;
        // There is no more room than for the first of it.
        caller.send_data(vec![0; 100].into()).await.unwrap();
        respond.send_response(Response::new(()), true).unwrap();
        assert_eq!(along(&mut end, call).await.unwrap().unwrap().status(), 200);
        pass(LONG).await;
        along(&mut end, async { while caller.send_data("more".into()).await.is_ok() {} }).await;
        drop(request);
    }
}

#[tokio::test]
async fn what_a_route_says_of_its_connection_is_not_said_in_http_2() {
    let upstream = Upstream::bind().await;
    let forward = forward(&upstream);
    let mut policy = Policy::new();
    for (name, value) in [("connection", "close"), ("keep-alive", "5"), ("te", "gzip"), ("x-kept", "yes")] {
        policy = policy.edit_request(Edit::Set(name.parse().unwrap(), HeaderValue::from_static(value)));
    }
    let call = tokio::spawn(forward.clone().policy(policy).oneshot(post(Empty::<Bytes>::new())));
    let mut end = accept(&upstream).await;
    let (request, mut respond) = next(&mut end).await;
    let mut names: Vec<_> = request.headers().keys().map(http::HeaderName::as_str).collect();
    names.sort_unstable();
    assert_eq!(names, ["content-length", "via", "x-forwarded-host", "x-forwarded-proto", "x-kept"]);
    respond.send_response(Response::new(()), true).unwrap();
    assert_eq!(along(&mut end, call).await.unwrap().unwrap().status(), 200);
}

#[tokio::test]
async fn an_endpoint_that_answers_pings_may_take_its_time() {
    let upstream = Upstream::bind().await;
    let forward = forward(&upstream);
    let often = Duration::from_millis(5);
    let call = tokio::spawn(forward.clone().keep_alive(often, super::PATIENCE).oneshot(post(Empty::<Bytes>::new())));
    let mut io = upstream.accept().await.io;
    io.write_all(&[0, 0, 0, 4, 0, 0, 0, 0, 0]).await.unwrap();
    io.read_exact(&mut [0; 24]).await.unwrap();
    let mut pings = 0;
    while pings < 3 {
        let mut head = [0; 9];
        within(io.read_exact(&mut head)).await.unwrap();
        let mut payload = vec![0; u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize];
        io.read_exact(&mut payload).await.unwrap();
        if (head[3], head[4]) == (6, 0) {
            pings += 1;
            head[4] = 1;
            io.write_all(&head).await.unwrap();
            io.write_all(&payload).await.unwrap();
        }
    }
    io.write_all(&[0, 0, 1, 1, 5, 0, 0, 0, 1, 0x88]).await.unwrap();
    assert_eq!(within(call).await.unwrap().unwrap().status(), 200);
}

/// It cannot be called back: when the connection goes on, it leaves before the reset that follows it.
#[tokio::test]
async fn what_waits_behind_a_connection_that_takes_nothing_may_have_been_sent() {
    let upstream = Upstream::bind().await;
    let forward = forward(&upstream).response_timeout(Duration::from_millis(50));
    let taken = Arc::new(AtomicUsize::new(0));
    let counted = taken.clone();
    let endless = std::iter::repeat_with(move || {
        counted.fetch_add(1, Ordering::Relaxed);
        Ok::<_, Infallible>(Frame::data(Bytes::from(vec![0; 64 << 10])))
    });
    let _call = tokio::spawn(forward.clone().oneshot(post(StreamBody::new(futures::stream::iter(endless)))));
    let mut io = upstream.accept().await.io;
    // Room for 2 GiB in each stream and in all of them, and nobody who reads.
    io.write_all(&[0, 0, 6, 4, 0, 0, 0, 0, 0, 0, 4, 0x7f, 0xff, 0xff, 0xff]).await.unwrap();
    io.write_all(&[0, 0, 4, 8, 0, 0, 0, 0, 0, 0x7f, 0xfe, 0, 0]).await.unwrap();
    let (mut before, mut same) = (0, 0);
    while before == 0 || same < 1000 {
        tokio::task::yield_now().await;
        let now = taken.load(Ordering::Relaxed);
        same = if now == before { same + 1 } else { 0 };
        before = now;
    }
    let response = within(forward.oneshot(post(Empty::<Bytes>::new()))).await.unwrap();
    assert_eq!(rejection(&response), (504, "response-timeout", true));
}
